"""RMSNorm, written as its formula."""

from __future__ import annotations

from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension.  Source: Zhang & Sennrich 2019 (arXiv:1910.07467), eq. (4)."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight_D
