"""Zamba (`transformers` modeling_zamba): layers of r and gr, in any order, and one shared block."""

from __future__ import annotations

from collections.abc import Iterator

from zexp.model.hf import pieces
from zexp.model.hf.entries import Always, Config, Fixed, Flat, Same
from zexp.model.hf.family import Family, Layer, Parts, count
from zexp.model.hf.llama import ends, trunk
from zexp.model.hf.mamba import block
from zexp.model.hf.pieces import Piece
from zexp.model.hf.zamba2 import PLAIN, hybrid, shared, tied

_layers, _named = hybrid("r")


def unlayers(config: Config) -> list[Layer]:
    """layers_block_type, or where it is missing r r gr and then one gr in every attn_layer_period."""
    if config.get("layers_block_type") or config.get("layer_types"):
        return _named(config)
    period, offset = config.get("attn_layer_period", 6), config.get("attn_layer_offset", 4)
    rest = [("gr",) if index % period == offset else ("r",) for index in range(count(config) - 3)]
    return [("r",), ("r",), ("gr",), *rest]


class KvHeads(Same):
    """As many as heads: the shared block has no others."""

    def ours(self) -> list[str]:
        return []

    def read(self, config: Config) -> Flat:
        return Fixed(self.theirs, config.get("num_attention_heads", 16), 16).read(config)


def tensors(parts: Parts) -> Iterator[Piece]:
    yield from ends(parts, "model.embed_tokens", "model.final_layernorm")
    width, g = parts.width, parts.specs["g"]
    entered, inner = g.input_width(width), g.mlp_width
    [places] = shared(parts, "r", "shared_transf")
    ours = "shared.g.0"
    yield tied(f"{ours}.input_norm.weight", places, ["input_layernorm"], entered)
    yield tied(f"{ours}.mlp_norm.weight", places, ["pre_ff_layernorm"], width)
    yield tied(f"{ours}.qkv.weight", places, [f"self_attn.{name}_proj" for name in "qkv"], entered, entered)
    yield tied(f"{ours}.out.weight", places, ["self_attn.o_proj"], width, entered)
    yield tied(f"{ours}.up.weight", places, ["feed_forward.gate_proj", "feed_forward.up_proj"], inner, width)
    yield tied(f"{ours}.down.weight", places, ["feed_forward.down_proj"], width, inner)
    for index, layer in enumerate(parts.layers):
        old = f"model.layers.{index}"
        within = f"{old}.mamba_decoder" if layer == "gr" else old
        yield from pieces.norm(f"layers.{index}.norm", f"{within}.input_layernorm", "rmsnorm", width)
        yield from pieces.mamba1_heads(f"layers.{index}.branches.r", f"{within}.mamba", parts.specs["r"], width)
        if layer == "gr":
            yield pieces.same(f"layers.{index}.call.linear.weight", f"{old}.linear.weight", width, width)


def limits(parts: Parts) -> list[str]:
    """Its ties name a second layer."""
    calls = sum(layer == "gr" for layer in parts.layers)
    return [] if calls > 1 else [f"arch.pattern: 'gr' stands there {calls} times; a ZambaForCausalLM needs it twice."]


FAMILY = Family(
    model_type="zamba",
    class_name="ZambaForCausalLM",
    unit=(("r", "gr"),),
    entries=(
        *trunk(eps=1e-5, tied=True),
        *block("mamba_"),
        Same("n_mamba_heads", "blocks.r.heads", 2),
        Always("blocks.r.inner_norms", False),
        Same("num_attention_heads", "blocks.g.heads", 16),
        KvHeads("num_key_value_heads", "blocks.g.heads"),
        Same("intermediate_size", "blocks.g.mlp_width", 14848),
        Same("hidden_act", "blocks.g.activation", "gelu", values=PLAIN),
        Always("blocks.g.copies", 1),
        Always("blocks.g.concat_embeddings", True),
        Always("blocks.g.call_linear", True),
        Always("blocks.g.lora_rank.mlp", 0),
        Always("blocks.g.lora_rank.attention", 0),
        Always("blocks.g.rope_theta", None),
        Fixed("hidden_mamba_act", "silu"),
        Fixed("attention_dropout", 0.0),
    ),
    layers=_layers,
    unlayers=unlayers,
    tensors=tensors,
    limits=limits,
)
