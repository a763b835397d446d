"""Mistral (`transformers` modeling_mistral): N·(w d), or N·(a d) with sliding_window null."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from zexp.model.hf.entries import Config, Entry, Fixed, Rope, Same, Unreadable
from zexp.model.hf.family import Family, Layer, count
from zexp.model.hf.llama import GATED, gqa, head_dim, tensors, trunk


def attention(letter: str, theta: float, kv_heads: int | None = 8) -> tuple[Entry, ...]:
    """Attention of the models that follow Mistral, by its letter."""
    return (
        *gqa(letter, kv_heads),
        Same("head_dim", f"blocks.{letter}.head_dim", head_dim),
        Rope(letter, theta),
    )


def windows(theirs: Sequence[Layer]) -> dict[str, Any]:
    """num_hidden_layers; the window is null where every layer sees all. Raises Unreadable for a mixture of both."""
    letters = {mixer for mixer, _ in theirs}
    if len(letters) > 1:
        raise Unreadable("one sliding_window is for all layers, so either all are 'w' or all are 'a'.")
    return {"num_hidden_layers": len(theirs), **({"sliding_window": None} if letters == {"a"} else {})}


def windowed(channel: str, default: int | None) -> Callable[[Config], list[Layer]]:
    """unlayers: w where there is a window, else a. default: the family's window."""

    def unlayers(config: Config) -> list[Layer]:
        window = config.get("sliding_window", default)
        return [("a" if window is None else "w", channel)] * count(config)

    return unlayers


WINDOW = Same("sliding_window", "blocks.w.window", 4096)

FAMILY = Family(
    model_type="mistral",
    class_name="MistralForCausalLM",
    unit=(("w", "a"), ("d",)),
    entries=(
        *trunk(eps=1e-6, tied=False),
        *attention("a", 10_000.0),
        *attention("w", 10_000.0),
        WINDOW,
        Same("intermediate_size", "blocks.d.width"),
        Same("hidden_act", "blocks.d.activation", "silu", values=GATED),
        Fixed("attention_dropout", 0.0),
    ),
    layers=windows,
    unlayers=windowed("d", 4096),
    tensors=tensors,
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
