"""RWKV-7's output with a hand-written gradient that keeps its inputs and a mean and a deviation a head.

B batch · T positions · H heads · N width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zexp.kernels.precision import at_least_fp32


def rwkv7_out(
    y_BTHN: Tensor,
    r_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHN: Tensor,
    g_BTHN: Tensor,
    r_k_HN: Tensor,
    weight_HN: Tensor,
    bias_HN: Tensor,
    eps: float,
) -> Tensor:
    """(norm(y) * weight + bias + (sum of r * r_k * k) v) * g, in g's dtype; the norm is a LayerNorm of each head.

    Source: RWKV-7 (arXiv:2503.14456), section 4.1 (the bonus u_t and the output).
    """
    return _Out.apply(y_BTHN, r_BTHN, k_BTHN, v_BTHN, g_BTHN, r_k_HN, weight_HN, bias_HN, eps)


class _Out(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y_BTHN: Tensor,
        r_BTHN: Tensor,
        k_BTHN: Tensor,
        v_BTHN: Tensor,
        g_BTHN: Tensor,
        r_k_HN: Tensor,
        weight_HN: Tensor,
        bias_HN: Tensor,
        eps: float,
    ) -> Tensor:
        y, r, k, v, g = (at_least_fp32(tensor) for tensor in (y_BTHN, r_BTHN, k_BTHN, v_BTHN, g_BTHN))
        variance, mean = torch.var_mean(y, dim=-1, correction=0, keepdim=True)
        inverse = variance.add_(eps).rsqrt_()
        bonus = (r * k).mul_(r_k_HN).sum(-1, keepdim=True)
        out = (y - mean).mul_(inverse).mul_(weight_HN).add_(bias_HN).addcmul_(bonus, v).mul_(g)
        ctx.save_for_backward(y_BTHN, r_BTHN, k_BTHN, v_BTHN, g_BTHN, r_k_HN, weight_HN, bias_HN, mean, inverse, bonus)
        return out.to(g_BTHN.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, r_k_HN, weight_HN, bias_HN, mean, inverse, bonus = ctx.saved_tensors
        y, r, k, v, g = (at_least_fp32(tensor) for tensor in inputs)
        dout = at_least_fp32(grads[0])
        normed = (y - mean).mul_(inverse)
        dg = (normed * weight_HN).add_(bias_HN).addcmul_(bonus, v).mul_(dout)
        dsum = dout * g  # of the gate's other factor
        dbonus = (dsum * v).sum(-1, keepdim=True)
        dv = dsum * bonus
        dr_k_HN = _sum((r * k).mul_(dbonus))
        scaled = dbonus * r_k_HN
        dbias_HN = _sum(dsum)
        dweight_HN = _sum(dsum * normed)
        dnormed = dsum.mul_(weight_HN)
        projected = (dnormed * normed).mean(-1, keepdim=True)
        dy = dnormed.sub_(dnormed.mean(-1, keepdim=True)).addcmul_(normed, projected, value=-1).mul_(inverse)
        found = (dy, scaled * k, scaled * r, dv, dg)
        return (
            *(gradient.to(tensor.dtype) for gradient, tensor in zip(found, inputs, strict=True)),
            dr_k_HN.to(r_k_HN.dtype), dweight_HN.to(weight_HN.dtype), dbias_HN.to(bias_HN.dtype), None,
        )  # fmt: skip


def _sum(x_BTHN: Tensor) -> Tensor:
    return x_BTHN.flatten(0, 1).sum(0)
