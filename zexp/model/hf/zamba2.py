"""Zamba2 (`transformers` modeling_zamba2): layers of m and gm, in any order; several shared blocks alternate.

Where dt is clamped: a full pass clamps it at time_step_min, decoding does not, and the vendor's code, with which the
published models were trained, never does. A model of ours without dt_min is written with a time_step_min that bounds
nothing, so that both agree with ours; one with dt_min agrees in full passes. On the way in, dt_min may be null whatever
the file says: the published files say 0.001.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from zexp.model.hf import pieces
from zexp.model.hf.entries import Always, Config, Entry, Fixed, Flat, Same, TimeStepMin, Unreadable
from zexp.model.hf.family import Family, Layer, Parts
from zexp.model.hf.llama import ends
from zexp.model.hf.mamba2 import Heads, block
from zexp.model.hf.pieces import Piece, Theirs

PLAIN = {"gelu_erf": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}
OLD_NAMES = {"mamba": "linear_attention", "attention": "full_attention"}  # of older files
EPS = 1e-5  # written into the gated norm's code


@dataclass(frozen=True)
class HeadDim(Same):
    """n_mamba_heads, from which the width of a head follows."""

    def write(self, flat: Flat) -> dict[str, Any]:
        return Heads(self.theirs).write(flat)

    def read(self, config: Config) -> Flat:
        inner = int(config.get("mamba_expand", 2)) * int(config["hidden_size"])
        return {self.path: inner // int(config.get(self.theirs) or 8)}


class Adapters(Entry):
    """One rank for the MLP's and, if there are any, attention's adapters."""

    theirs = "adapter_rank"

    def ours(self) -> list[str]:
        return ["blocks.g.lora_rank.mlp", "blocks.g.lora_rank.attention"]

    def write(self, flat: Flat) -> dict[str, Any]:
        mlp, attention = (flat.get(path, 0) for path in self.ours())
        return {self.theirs: mlp or 128, "use_shared_attention_adapter": attention > 0}

    def read(self, config: Config) -> Flat:
        rank = int(config.get(self.theirs, 128))
        return dict(zip(self.ours(), (rank, rank if config.get("use_shared_attention_adapter") else 0), strict=True))


class MemoryRope(Entry):
    """Rotary embedding in the shared blocks, or none."""

    theirs = "use_mem_rope"

    def ours(self) -> list[str]:
        return ["blocks.g.rope_theta"]

    def write(self, flat: Flat) -> dict[str, Any]:
        theta = flat.get(self.ours()[0])
        said = {} if theta is None else {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        return {self.theirs: theta is not None, **said}

    def read(self, config: Config) -> Flat:
        if not config.get(self.theirs, False):
            return {self.ours()[0]: None}
        said = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if (kind := said.get("rope_type", "default")) != "default":
            raise Unreadable(f"rope_parameters.rope_type = {kind!r}: a shared block has 'default' alone.")
        return {self.ours()[0]: float(said.get("rope_theta") or config.get("rope_theta") or 10_000.0)}


def hybrid(mixer: str) -> tuple[Callable[[Sequence[Layer]], dict[str, Any]], Callable[[Config], list[Layer]]]:
    """layers and unlayers of the Zamba models: layers_block_type. mixer: the letter of the layers."""
    kinds = {mixer: "linear_attention", f"g{mixer}": "hybrid"}

    def layers(theirs: Sequence[Layer]) -> dict[str, Any]:
        if not any(layer == f"g{mixer}" for (layer,) in theirs):
            raise Unreadable(f"no layer is 'g{mixer}', and a Zamba has shared blocks.")
        return {"num_hidden_layers": len(theirs), "layers_block_type": [kinds[layer] for (layer,) in theirs]}

    def unlayers(config: Config) -> list[Layer]:
        said = config.get("layers_block_type") or config.get("layer_types")
        if said is None:
            raise Unreadable("layers_block_type is missing.")
        back = {theirs: ours for ours, theirs in kinds.items()}
        names = [OLD_NAMES.get(kind, kind) for kind in said]
        if strange := sorted(set(names) - set(back)):
            raise Unreadable(f"layers_block_type has {', '.join(strange)}: zexp knows {', '.join(back)}.")
        return [(back[name],) for name in names]

    return layers, unlayers


def shared(parts: Parts, mixer: str, name: str) -> list[list[str]]:
    """For each copy of the shared block where it is called; the first place holds it in the file. name: its name there."""
    calls = [index for index, layer in enumerate(parts.layers) if layer == f"g{mixer}"]
    copies = parts.specs["g"].copies
    return [[f"model.layers.{index}.{name}" for index in calls[copy::copies]] for copy in range(copies)]


def tensors(parts: Parts) -> Iterator[Piece]:
    yield from ends(parts, "model.embed_tokens", "model.final_layernorm")
    width, m, g = parts.width, parts.specs["m"], parts.specs["g"]
    homes = shared(parts, "m", "shared_transformer")
    entered = g.input_width(width)
    for copy, places in enumerate(homes):
        ours, qkv = f"shared.g.{copy}", [f"self_attn.{name}_proj" for name in "qkv"]
        yield tied(f"{ours}.input_norm.weight", places, ["input_layernorm"], entered)
        yield tied(f"{ours}.mlp_norm.weight", places, ["pre_ff_layernorm"], width)
        yield tied(f"{ours}.qkv.weight", places, qkv, entered, entered)
        yield tied(f"{ours}.out.weight", places, ["self_attn.o_proj"], width, entered)
        yield tied(f"{ours}.up.weight", places, ["feed_forward.gate_up_proj"], 2 * g.mlp_width, width)
        yield tied(f"{ours}.down.weight", places, ["feed_forward.down_proj"], width, g.mlp_width)
    call = 0
    for index, layer in enumerate(parts.layers):
        ours, old = f"layers.{index}", f"model.layers.{index}"
        within = f"{old}.mamba_decoder" if layer == "gm" else old
        yield from pieces.norm(f"{ours}.norm", f"{within}.input_layernorm", "rmsnorm", width)
        yield from pieces.mamba2(f"{ours}.branches.m", f"{within}.mamba", m, width)
        if layer == "gm":
            yield pieces.same(f"{ours}.call.linear.weight", f"{old}.linear.weight", width, width)
            places = homes[call % g.copies]
            rank = g.lora_rank.mlp
            at = f"feed_forward.gate_up_proj_adapter_list.{call}"
            yield from _adapter(f"{ours}.call.mlp", places, at, width, rank, 2 * g.mlp_width)
            if g.lora_rank.attention:
                for number, name in enumerate("qkv"):
                    at = f"self_attn.linear_{name}_adapter_list.{call}"
                    yield from _adapter(f"{ours}.call.qkv.{number}", places, at, entered, rank, entered)
            call += 1


def _adapter(ours: str, places: list[str], at: str, entered: int, rank: int, left: int) -> Iterator[Piece]:
    yield tied(f"{ours}.down.weight", places, [f"{at}.0"], rank, entered)
    yield tied(f"{ours}.up.weight", places, [f"{at}.1"], left, rank)


def tied(ours: str, places: list[str], names: list[str], *shape: int) -> Piece:
    """Weights, of one shape each, that all layers of one copy share: written under the first of the places."""
    theirs = []
    for name in names:
        first, *others = (f"{place}.{name}.weight" for place in places)
        theirs.append(Theirs(first, shape, tuple(others)))
    return Piece(ours, tuple(theirs))


_layers, _unlayers = hybrid("m")
NAMES = {
    "expand": "mamba_expand", "state_size": "mamba_d_state", "groups": "mamba_ngroups", "conv_width": "mamba_d_conv",
    "chunk": "chunk_size",
}  # fmt: skip

FAMILY = Family(
    model_type="zamba2",
    class_name="Zamba2ForCausalLM",
    unit=(("m", "gm"),),
    entries=(
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "width"),
        Fixed("rms_norm_eps", EPS),
        Always("norm.eps", EPS),
        Always("norm.kind", "rmsnorm"),
        Same("tie_word_embeddings", "tie_embeddings", True),
        *block(NAMES, state_size=64, groups=1, chunk=256),
        HeadDim("n_mamba_heads", "blocks.m.head_dim"),
        TimeStepMin(),
        Same("num_mem_blocks", "blocks.g.copies", 1),
        Same("num_attention_heads", "blocks.g.heads", 32),
        Same("intermediate_size", "blocks.g.mlp_width", lambda config: 4 * config["hidden_size"]),
        Same("hidden_act", "blocks.g.activation", "gelu", values=PLAIN),
        Always("blocks.g.concat_embeddings", True),
        Always("blocks.g.call_linear", True),
        Adapters(),
        MemoryRope(),
        Fixed("add_bias_linear", False),
        Fixed("use_long_context", False),
        Fixed("attention_dropout", 0.0),
    ),
    layers=_layers,
    unlayers=_unlayers,
    tensors=tensors,
    tolerated={"blocks.m.dt_min": (None,)},
)
