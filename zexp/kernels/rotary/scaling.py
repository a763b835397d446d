"""How rotary frequencies are changed for longer contexts. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's rule: slow frequencies are divided by `factor`, fast ones stay, those between are blended.

    original_positions: s₀, the context that the model was first trained with. A frequency is slow if it turns fewer than
    low_turns times in s₀ positions, fast if more than high_turns times.
    Source: Meta, llama-models (models/llama3/model.py, apply_scaling); `rope_type: llama3` of `transformers`.
    """

    factor: float = 8.0
    low_turns: float = 1.0
    high_turns: float = 4.0
    original_positions: int = 8192

    def problems(self, where: str) -> list[str]:
        found = []
        if self.factor < 1:
            found.append(f"{where}.factor = {self.factor}: it must be at least 1.")
        if not 0 < self.low_turns < self.high_turns:
            found.append(f"{where}: low_turns = {self.low_turns} must be above 0 and below high_turns = {self.high_turns}.")
        if self.original_positions < 1:
            found.append(f"{where}.original_positions = {self.original_positions}: it must be at least 1.")
        return found
