"""RWKV-7's keys with a hand-written gradient that keeps k, a and a norm a head. H heads · N key width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zexp.kernels.precision import at_least_fp32

SQUARE_FLOOR = 1e-24  # added to a squared norm, so that a zero key has a direction (none) and a finite gradient


def rwkv7_keys(k: Tensor, a: Tensor, k_k_HN: Tensor, k_a_HN: Tensor) -> tuple[Tensor, Tensor]:
    """The written key k * (1 + (a - 1) * k_a), and the removal key k * k_k over its norm; (…, H, N), in fp32 at least.

    k, a: (…, H, N). Source: RWKV-7 (arXiv:2503.14456), section 4.1.
    """
    return _Keys.apply(k, a, k_k_HN, k_a_HN)


class _Keys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, a: Tensor, k_k_HN: Tensor, k_a_HN: Tensor) -> tuple[Tensor, Tensor]:
        k_hi, a_hi = at_least_fp32(k), at_least_fp32(a)
        removal = k_hi * k_k_HN
        inverse = removal.square().sum(-1, keepdim=True).add_(SQUARE_FLOOR).rsqrt_()
        ctx.save_for_backward(k, a, k_k_HN, k_a_HN, inverse)
        written = torch.addcmul(k_hi, (a_hi - 1).mul_(k_a_HN), k_hi)
        return written, removal.mul_(inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        k, a, k_k_HN, k_a_HN, inverse = ctx.saved_tensors
        dwritten, dremoval = grads
        k_hi, less = at_least_fp32(k), at_least_fp32(a) - 1
        direction = (k_hi * k_k_HN).mul_(inverse)
        along = (direction * dremoval).sum(-1, keepdim=True)
        dscaled = torch.addcmul(dremoval, direction, along, value=-1).mul_(inverse)  # of k * k_k
        dk = (dscaled * k_k_HN).add_(dwritten).addcmul_(dwritten, less * k_a_HN)
        dk_k = _sum(dscaled.mul_(k_hi))
        dproduct = dwritten * k_hi  # of (a - 1) * k_a
        dk_a = _sum(less.mul_(dproduct))
        return dk.to(k.dtype), dproduct.mul_(k_a_HN).to(a.dtype), dk_k.to(k_k_HN.dtype), dk_a.to(k_a_HN.dtype)


def _sum(x: Tensor) -> Tensor:
    return x.flatten(0, -3).sum(0)
