"""Mixtral (`transformers` modeling_mixtral): N·(a e), or N·(w e) with a sliding window."""

from __future__ import annotations

from collections.abc import Iterator

from zexp.model.hf import pieces
from zexp.model.hf.entries import Always, Fixed, Same
from zexp.model.hf.family import Family, Parts
from zexp.model.hf.llama import GATED, ends, layer, trunk
from zexp.model.hf.mistral import WINDOW, attention, windowed, windows
from zexp.model.hf.pieces import Piece


def tensors(parts: Parts) -> Iterator[Piece]:
    yield from ends(parts, "model.embed_tokens", "model.norm")
    for index in range(len(parts.layers) // 2):
        yield from layer(parts, index)
        ours, theirs = f"layers.{2 * index + 1}.branches.e", f"model.layers.{index}.block_sparse_moe"
        yield from pieces.experts(ours, theirs, parts.specs["e"], parts.width, up=("w1", "w3"), down="w2")


FAMILY = Family(
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    unit=(("a", "w"), ("e",)),
    entries=(
        *trunk(eps=1e-5, tied=False),
        *attention("a", 1_000_000.0),
        *attention("w", 1_000_000.0),
        WINDOW,
        Same("intermediate_size", "blocks.e.width"),
        Same("num_local_experts", "blocks.e.experts", 8),
        Same("num_experts_per_tok", "blocks.e.top_k", 2),
        Same("hidden_act", "blocks.e.activation", "silu", values=GATED),
        Always("blocks.e.normalise", True),
        Fixed("attention_dropout", 0.0),
    ),
    layers=windows,
    unlayers=windowed("e", None),
    tensors=tensors,
)
