"""Initial weights: drawn on the CPU from one generator, in the order of the model's modules."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Initial step sizes of Mamba, Mamba-2 and gated DeltaNet (arXiv:2312.00752, section 3.6; state-spaces/mamba).
DT_RANGE = (1e-3, 1e-1)
DT_FLOOR = 1e-4
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

    def conv(self, weight_CK: Tensor, bias_C: Tensor | None) -> None:
        """A depthwise convolution: uniform in ± K^-1/2, nn.Conv1d's own range."""
        bound = weight_CK.shape[1] ** -0.5
        self.uniform(weight_CK, -bound, bound)
        if bias_C is not None:
            self.uniform(bias_C, -bound, bound)

    @torch.no_grad()
    def dt_bias(self, parameter: Tensor) -> None:
        """Biases under a softplus whose values, the first step sizes, are log-uniform in DT_RANGE."""
        self.uniform(parameter, math.log(DT_RANGE[0]), math.log(DT_RANGE[1]))
        dt = parameter.exp().clamp_(min=DT_FLOOR)
        parameter.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt

    def linear(self, module: torch.nn.Linear, *, residual: bool = False) -> None:
        """A linear map: normal weights, zero bias."""
        self.residual(module.weight) if residual else self.normal(module.weight)
        if module.bias is not None:
            self.constant(module.bias, 0.0)
