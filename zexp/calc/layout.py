"""How a model is spread over devices, and whether its blocks can be cut that way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zexp.blocks.base import BlockSpec
from zexp.blocks.resolve import specs_of

CHECKPOINTING = ("none", "full")
AUTO = "auto"  # of a config: one of them, chosen where the device is known


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of parallelism; 1 everywhere is one device.

    data: copies of the model, each with micro-batches of its own. zero: what the copies share out among them (ZeRO,
    arXiv:1910.02054): 0 nothing, 1 the optimizer's state, 2 and the gradients, 3 and the weights.
    tensor: devices that share the matrices of one copy. expert: of the copies, how many share one set of experts.
    checkpointing: none, or full: a layer's input alone is kept, the rest is computed again in the backward pass.
    """

    data: int = 1
    zero: int = 0
    tensor: int = 1
    expert: int = 1
    checkpointing: str = "none"

    @property
    def devices(self) -> int:
        return self.data * self.tensor

    def problems(self, model: Mapping[str, Any] | None) -> list[str]:
        """What is illegal, one text each; without a model, of the layout alone."""
        found = self._own_problems()
        if found or model is None:
            return found
        specs = specs_of(model)
        if self.tensor > 1:
            for letter, spec in specs.items():
                found += self._tensor_problems(letter, spec, model["width"])
        if self.expert > 1:
            experts = {letter: spec.expert_divides() for letter, spec in specs.items() if spec.expert_divides()}
            if not experts:
                found.append(f"parallelism.expert = {self.expert}: the architecture has no experts to spread. Set it to 1.")
            for letter, sizes in experts.items():
                found += _undivided("expert", self.expert, letter, sizes)
        return found

    def _own_problems(self) -> list[str]:
        degrees = {"data": self.data, "tensor": self.tensor, "expert": self.expert}
        found = [f"parallelism.{key} = {value}: it must be at least 1." for key, value in degrees.items() if value < 1]
        if self.zero not in (0, 1, 2, 3):
            found.append(f"parallelism.zero = {self.zero}: it is 0, 1, 2 or 3.")
        if self.checkpointing not in CHECKPOINTING:
            found.append(
                f"parallelism.activation_checkpointing = {self.checkpointing!r}; it is {', '.join(CHECKPOINTING)} or {AUTO}."
            )
        if not found and self.data % self.expert:
            found.append(
                f"parallelism.expert = {self.expert}: it must divide parallelism.data = {self.data}, whose copies spread "
                "the experts among them."
            )
        return found

    def _tensor_problems(self, letter: str, spec: BlockSpec, width: int) -> list[str]:
        sizes = spec.tensor_divides(width)
        if sizes is None:
            return [
                f"parallelism.tensor = {self.tensor}: the block {spec.NAME} ({letter}) has no tensor-parallel form.\n"
                "  Set parallelism.tensor to 1; parallelism.zero shares memory among copies instead."
            ]
        return _undivided("tensor", self.tensor, letter, sizes)


def _undivided(key: str, degree: int, letter: str, sizes: Mapping[str, int]) -> list[str]:
    return [
        f"parallelism.{key} = {degree}: it does not divide arch.blocks.{letter}'s {name} = {size}. Choose a divisor of {size}."
        for name, size in sizes.items()
        if size % degree
    ]
