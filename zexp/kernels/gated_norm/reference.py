"""Gated RMSNorm, written as its formula."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gated_norm(y: Tensor, z: Tensor, weight_I: Tensor, eps: float, groups: int) -> Tensor:
    """RMSNorm of y * silu(z), each of `groups` equal parts of the last dimension normed by itself, times weight."""
    gated = y * F.silu(z)
    parts = gated.unflatten(-1, (groups, -1))
    return (parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight_I


def norm_gated(y: Tensor, z: Tensor, weight_I: Tensor, eps: float, groups: int) -> Tensor:
    """RMSNorm of y times weight times silu(z), each of `groups` equal parts of the last dimension normed by itself."""
    parts = y.unflatten(-1, (groups, -1))
    normed = (parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)
    return normed * weight_I * F.silu(z)
