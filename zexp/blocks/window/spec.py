"""Sliding-window attention: the keys and formulas of attention, and a window.

q query heads · kv key-value heads · d_h head width · D model width · s sequence length · W window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zexp.blocks.attention import spec as attention
from zexp.blocks.base import unit_problems


@dataclass(frozen=True, kw_only=True)
class Spec(attention.Spec):
    """Attention to the last W positions (Mistral 7B, arXiv:2310.06825, section 2).

    window: positions that a query sees, itself included. The other keys are those of attention.
    """

    NAME: ClassVar[str] = "window"
    NUMERICS: ClassVar[dict[str, int]] = {"block.window": 1, "kernel.attention": 1, "kernel.rotary": 1}

    window: int

    @property
    def seen(self) -> int | None:
        return self.window

    def problems(self, width: int, where: str) -> list[str]:
        return unit_problems({"window": self.window}, where) + super().problems(width, where)

    def score_flops(self, width: int, seq_len: int) -> float:
        q, _, d_h = self._sizes(width)
        seen = min(self.window, seq_len)
        keys = seen - seen * (seen - 1) / (2 * seq_len)  # the mean over positions of min(t, W), t = 1 .. s
        return 4 * keys * q * d_h

    def kv_bytes_per_token(self, width: int, element_bytes: int) -> int:
        return 0

    def state_bytes(self, width: int, element_bytes: int) -> int:
        return self.window * super().kv_bytes_per_token(width, element_bytes)

    def cache_bytes(self, width: int, context: int, element_bytes: int) -> int:
        return min(context, self.window) * super().kv_bytes_per_token(width, element_bytes)
