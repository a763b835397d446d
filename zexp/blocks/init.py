"""Initial weights: drawn on the CPU from one generator, in the order of the model's modules."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

STD = 0.02  # of embeddings and of matrices that say nothing else (GPT-2, Llama, Zamba2)


@dataclass(frozen=True)
class Draw:
    """Fills parameters in place, in fp32 on the CPU, whatever the global random state is.

    writes: how many branches add to the residual stream. Matrices that write to it are scaled by 1 / sqrt(writes),
    so that the stream's variance does not grow with depth (GPT-2; Mamba's rescaled prenorm residual).
    """

    generator: torch.Generator
    writes: int

    @torch.no_grad()
    def normal(self, parameter: Tensor, std: float = STD) -> None:
        parameter.normal_(0.0, std, generator=self.generator)

    @torch.no_grad()
    def uniform(self, parameter: Tensor, low: float, high: float) -> None:
        parameter.uniform_(low, high, generator=self.generator)

    @torch.no_grad()
    def constant(self, parameter: Tensor, value: float) -> None:
        parameter.fill_(value)

    def residual(self, matrix: Tensor) -> None:
        """A matrix that writes to the residual stream."""
        self.normal(matrix, STD / math.sqrt(self.writes))

    def linear(self, module: torch.nn.Linear, *, residual: bool = False) -> None:
        """A linear map: normal weights, zero bias."""
        self.residual(module.weight) if residual else self.normal(module.weight)
        if module.bias is not None:
            self.constant(module.bias, 0.0)
