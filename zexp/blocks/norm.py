"""The norm modules that blocks and models share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zexp.blocks.init import Draw
from zexp.kernels.dispatch import TORCH, Kernels


class RmsNorm(nn.Module):
    """RMSNorm over the last dimension with a weight per channel."""

    kernels: Kernels = TORCH

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def initialise(self, draw: Draw) -> None:
        draw.constant(self.weight, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension with a weight and a bias per channel (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def initialise(self, draw: Draw) -> None:
        draw.constant(self.weight, 1.0)
        draw.constant(self.bias, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def norm(kind: str, width: int, eps: float) -> RmsNorm | LayerNorm:
    """The norm of that kind: rmsnorm or layernorm."""
    return LayerNorm(width, eps) if kind == "layernorm" else RmsNorm(width, eps)
