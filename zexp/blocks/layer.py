"""What every block's module answers. B batch · T positions · D model width."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from zexp.blocks.cache import Cache
from zexp.blocks.context import Context
from zexp.blocks.init import Draw
from zexp.kernels.dispatch import TORCH, Kernels


@dataclass(frozen=True)
class Place:
    """Which of the model's layers (or branches) of one letter this is: number `index` of `count`, from 0."""

    index: int
    count: int

    @property
    def depth(self) -> float:
        """0 for the first, 1 for the last."""
        return self.index / max(self.count - 1, 1)


class BlockLayer(nn.Module, ABC):
    """One branch of a layer: a function of the normed residual stream whose output is added to the stream.

    It is built with (spec, width, eps, place): the completed Spec of its block, D, the eps of the model's norms, and
    which layer of its letter it is.
    A block that mixes along the sequence overrides new_cache and decode; the defaults are for one that does not.
    """

    # This module's own parameters that weight decay applies to, besides the weights of nn.Linear.
    DECAYED: ClassVar[tuple[str, ...]] = ()

    # What forward calls; of a built model, those of its device.
    kernels: Kernels = TORCH

    @abstractmethod
    def initialise(self, draw: Draw) -> None:
        """Draws every parameter, in fp32 on the CPU."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """(B, T, D) from whole sequences; position t depends on positions up to t of its own document (but for what
        balances a router in training: zexp/blocks/moe/spec.py).
        """

    def new_cache(self, batch: int, like: Tensor) -> Cache | None:
        """The memory before the first token of `batch` sequences, on the device and in the dtype of `like`
        (recurrent states in fp32 at least); None = the block remembers nothing.
        """
        return None

    def decode(self, x_BTD: Tensor, cache: Cache | None, context: Context) -> Tensor:
        """(B, T, D) for the next T >= 1 positions after those that the cache has seen, which it then has seen too.

        No gradient, one document a row. All T at once or one by one: the same numbers but for rounding.
        """
        return self.forward(x_BTD, context)

    def step_counts(self) -> list[Tensor]:
        """Integers that this step's tokens were counted into and that after_step reads; several processes that train on
        parts of one batch replace them, in place, by their sums.
        """
        return []

    def after_step(self) -> None:
        """Called after every optimizer step, for what changes by a rule and not by a gradient."""
