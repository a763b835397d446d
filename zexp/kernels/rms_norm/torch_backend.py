"""RMSNorm with a hand-written gradient: it keeps x and one number a row, where autograd keeps four arrays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zexp.kernels.precision import at_least_fp32


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, in x's dtype; the mean is taken in fp32 at least."""
    return _RmsNorm.apply(x, weight_D, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_hi = at_least_fp32(x)
        inverse = x_hi.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, inverse)
        return (x_hi * inverse).mul_(weight_D).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, inverse = ctx.saved_tensors
        dy = at_least_fp32(grads[0])
        normed = at_least_fp32(x) * inverse
        dweight_D = (dy * normed).flatten(0, -2).sum(0)
        dx = dy * weight_D
        mean = (dx * normed).mean(-1, keepdim=True)
        dx.addcmul_(normed, mean, value=-1).mul_(inverse)
        return dx.to(x.dtype), dweight_D.to(weight_D.dtype), None
