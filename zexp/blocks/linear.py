"""The linear map that blocks are made of."""

from __future__ import annotations

from torch import Tensor, nn

from zexp.kernels.dispatch import TORCH, Kernels


class Linear(nn.Linear):
    """torch's, computed by the kernels that the model was given: decoding has few rows, for which torch's product is slow."""

    kernels: Kernels = TORCH

    def forward(self, input: Tensor) -> Tensor:
        return self.kernels.linear(input, self.weight, self.bias)
