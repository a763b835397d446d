"""The norm module that blocks and models share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zexp.blocks.init import Draw
from zexp.kernels.rms_norm.torch_backend import rms_norm


class RmsNorm(nn.Module):
    """RMSNorm over the last dimension with a weight per channel."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def initialise(self, draw: Draw) -> None:
        draw.constant(self.weight, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
