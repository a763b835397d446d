"""Gated RMSNorm with a hand-written gradient. I inner width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zexp.kernels.precision import at_least_fp32


def gated_norm(y: Tensor, z: Tensor, weight_I: Tensor, eps: float, groups: int) -> Tensor:
    """RMSNorm of y * silu(z) times weight, in y's dtype; each of `groups` equal parts of I is normed by itself.

    Source: Mamba-2 (arXiv:2405.21060), section 7.
    """
    return _GatedNorm.apply(y, z, weight_I, eps, groups)


def norm_gated(y: Tensor, z: Tensor, weight_I: Tensor, eps: float, groups: int) -> Tensor:
    """RMSNorm of y times weight times silu(z), in y's dtype; each of `groups` equal parts of I is normed by itself."""
    y_hi, z_hi = at_least_fp32(y), at_least_fp32(z)
    parts = y_hi.unflatten(-1, (groups, -1))
    normed = (parts * (parts.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2)
    return (normed * weight_I * torch.nn.functional.silu(z_hi)).to(y.dtype)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight_I: Tensor, eps: float, groups: int) -> Tensor:
        y_hi, z_hi = at_least_fp32(y), at_least_fp32(z)
        # The sigmoid is kept: an exponential costs as much as eight multiplications of arrays.
        sigmoid = z_hi.sigmoid()
        normed = (y_hi * z_hi).mul_(sigmoid)
        parts = normed.unflatten(-1, (groups, -1))
        inverse = parts.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        parts.mul_(inverse)
        ctx.save_for_backward(y, z, weight_I, sigmoid, normed, inverse)
        return (normed * weight_I).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        y, z, weight_I, sigmoid, normed, inverse = ctx.saved_tensors
        dout = at_least_fp32(grads[0])
        scratch = dout * normed
        dweight_I = scratch.flatten(0, -2).sum(0)
        scratch.mul_(weight_I)
        groups = inverse.shape[-2]
        mean = scratch.unflatten(-1, (groups, -1)).mean(-1, keepdim=True)
        dgated = dout * weight_I
        parts = dgated.unflatten(-1, (groups, -1))
        parts.addcmul_(normed.unflatten(-1, (groups, -1)), mean, value=-1).mul_(inverse)
        y_hi, z_hi = at_least_fp32(y), at_least_fp32(z)
        silu = torch.mul(z_hi, sigmoid, out=scratch)
        dy = dgated * silu
        slope = torch.addcmul(silu, silu, sigmoid, value=-1).add_(sigmoid)  # of silu: s + z·s·(1 - s)
        dz = slope.mul_(y_hi).mul_(dgated)
        return dy.to(y.dtype), dz.to(z.dtype), dweight_I.to(weight_I.dtype), None, None
