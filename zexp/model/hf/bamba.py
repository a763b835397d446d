"""Bamba (`transformers` modeling_bamba): N·((m or a) d)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from zexp.model.hf import pieces
from zexp.model.hf.entries import Config, Fixed, Rope, Same, TimeStepLimit
from zexp.model.hf.family import Family, Layer, Parts, count, some_attention
from zexp.model.hf.llama import ends, gqa, head_dim, trunk
from zexp.model.hf.mamba2 import Heads, block
from zexp.model.hf.pieces import Piece


def layers(theirs: Sequence[Layer]) -> dict[str, Any]:
    attention = [index for index, (mixer, _) in enumerate(theirs) if mixer == "a"]
    return {"num_hidden_layers": len(theirs), "attn_layer_indices": attention}


def unlayers(config: Config) -> list[Layer]:
    attention = config.get("attn_layer_indices") or []
    return [("a" if index in attention else "m", "d") for index in range(count(config))]


def mamba_head_dim(config: Config) -> int:
    """Where mamba_d_head is "auto" or missing."""
    return int(config.get("mamba_expand", 2)) * int(config["hidden_size"]) // int(config.get("mamba_n_heads", 128))


class MambaHeadDim(Same):
    """mamba_d_head, which may be "auto"."""

    def read(self, config: Config) -> dict[str, Any]:
        known = config.get(self.theirs, "auto")
        return {self.path: mamba_head_dim(config) if known in ("auto", None) else int(known)}


def tensors(parts: Parts) -> Iterator[Piece]:
    yield from ends(parts, "model.embed_tokens", "model.final_layernorm")
    width = parts.width
    for index in range(len(parts.layers) // 2):
        mixer, after, old = 2 * index, 2 * index + 1, f"model.layers.{index}"
        yield from pieces.norm(f"layers.{mixer}.norm", f"{old}.input_layernorm", "rmsnorm", width)
        yield from pieces.norm(f"layers.{after}.norm", f"{old}.pre_ff_layernorm", "rmsnorm", width)
        if parts.layers[mixer] == "a":
            yield from pieces.attention(f"layers.{mixer}.branches.a", f"{old}.self_attn", parts.specs["a"], width)
        else:
            yield from pieces.mamba2(f"layers.{mixer}.branches.m", f"{old}.mamba", parts.specs["m"], width)
        yield from pieces.mlp(f"layers.{after}.branches.d", f"{old}.feed_forward", parts.specs["d"], width)


def limits(parts: Parts) -> list[str]:
    """It has both: BambaConfig checks sizes of Mamba2, and a pass asks attention's cache."""
    return some_attention(parts) + (
        [] if "m" in parts.letters else ["arch.pattern: no layer is 'm', and a Bamba has some."]
    )


NAMES = {
    "expand": "mamba_expand", "state_size": "mamba_d_state", "groups": "mamba_n_groups", "conv_width": "mamba_d_conv",
    "chunk": "mamba_chunk_size",
}  # fmt: skip

FAMILY = Family(
    model_type="bamba",
    class_name="BambaForCausalLM",
    unit=(("m", "a"), ("d",)),
    entries=(
        *trunk(eps=1e-5, tied=False),
        *block(NAMES, state_size=256, groups=1, chunk=256),
        MambaHeadDim("mamba_d_head", "blocks.m.head_dim"),
        Heads("mamba_n_heads"),
        TimeStepLimit(),
        *gqa("a", kv_heads=8),
        Same("head_dim", "blocks.a.head_dim", head_dim),
        Same("attention_bias", "blocks.a.bias", False),
        Rope("a", fraction=0.5),
        Same("intermediate_size", "blocks.d.width"),
        # The key is also for what follows Mamba2's convolution, which is SiLU.
        Same("hidden_act", "blocks.d.activation", "silu", values={"swiglu": "silu"}),
        Same("mlp_bias", "blocks.d.bias", False),
        Fixed("mamba_conv_bias", True),
        Fixed("mamba_proj_bias", False),
        Fixed("attention_dropout", 0.0),
    ),
    layers=layers,
    unlayers=unlayers,
    tensors=tensors,
    limits=limits,
)
