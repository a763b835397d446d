"""Mamba2 (`transformers` modeling_mamba2): N·m."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zexp.model.hf import pieces
from zexp.model.hf.entries import Always, Config, Entry, Fixed, Flat, Same, TimeStepLimit
from zexp.model.hf.family import Family, Parts, counted
from zexp.model.hf.llama import ends, trunk
from zexp.model.hf.pieces import Piece


@dataclass(frozen=True)
class Heads(Entry):
    """The number of Mamba2's heads, which ours derives from expand, width and head_dim."""

    theirs: str

    def ours(self) -> list[str]:
        return []

    def write(self, flat: Flat) -> dict[str, Any]:
        at = "blocks.m."
        return (
            {self.theirs: flat[at + "expand"] * flat["width"] // flat[at + "head_dim"]} if at + "expand" in flat else {}
        )

    def read(self, config: Config) -> Flat:
        return {}


def block(names: dict[str, str], state_size: int, groups: int, chunk: int) -> tuple[Entry, ...]:
    """Mamba2's keys. names: ours -> theirs; the numbers are the family's defaults."""
    defaults = {"expand": 2, "state_size": state_size, "groups": groups, "conv_width": 4, "chunk": chunk}
    return (
        *(Same(names[key], f"blocks.m.{key}", value) for key, value in defaults.items()),
        Always("blocks.m.norm_before_gate", False),
    )


def tensors(parts: Parts) -> Iterator[Piece]:
    yield from ends(parts, "backbone.embeddings", "backbone.norm_f")
    for index in range(len(parts.layers)):
        old = f"backbone.layers.{index}"
        yield from pieces.norm(f"layers.{index}.norm", f"{old}.norm", "rmsnorm", parts.width)
        yield from pieces.mamba2(f"layers.{index}.branches.m", f"{old}.mixer", parts.specs["m"], parts.width)


_layers, _unlayers = counted(("m",))
NAMES = {
    "expand": "expand",
    "state_size": "state_size",
    "groups": "n_groups",
    "conv_width": "conv_kernel",
    "chunk": "chunk_size",
}

FAMILY = Family(
    model_type="mamba2",
    class_name="Mamba2ForCausalLM",
    unit=(("m",),),
    entries=(
        *trunk(eps=1e-5, tied=False, eps_key="layer_norm_epsilon"),
        *block(NAMES, state_size=128, groups=8, chunk=256),
        Same("head_dim", "blocks.m.head_dim", 64),
        Heads("num_heads"),
        TimeStepLimit(),
        Fixed("use_bias", False),
        Fixed("use_conv_bias", True),
        Fixed("hidden_act", "silu"),
    ),
    layers=_layers,
    unlayers=_unlayers,
    tensors=tensors,
)
