"""Gated RMSNorm by kernel.cpp. I inner width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zexp.kernels.cpp.library import SUFFIX, call, library, not_taken, rows
from zexp.kernels.fused import Fused


def cpp() -> dict[str, Fused]:
    library("gated_norm")
    return {"gated_norm": Fused(gated_norm, refuses), "norm_gated": Fused(norm_gated, refuses)}


def gated_norm(y: Tensor, z: Tensor, weight_I: Tensor, eps: float, groups: int) -> Tensor:
    """As the torch backend's."""
    return _norm(y, z, weight_I, eps, groups, True)


def norm_gated(y: Tensor, z: Tensor, weight_I: Tensor, eps: float, groups: int) -> Tensor:
    """As the torch backend's."""
    return _norm(y, z, weight_I, eps, groups, False)


def refuses(y: Tensor, z: Tensor, weight_I: Tensor, eps: float, groups: int) -> str | None:
    if z.shape != y.shape or weight_I.shape != y.shape[-1:] or y.shape[-1] % groups:
        return "other sizes than those of a norm"  # which torch's form will not take either, and says so
    return not_taken(activations=(y, z), whole=(weight_I,), taken=SUFFIX)


def _norm(y: Tensor, z: Tensor, weight_I: Tensor, eps: float, groups: int, gate_first: bool) -> Tensor:
    weight_I = weight_I.float().contiguous()
    if torch.is_grad_enabled():
        return _GatedNorm.apply(y, z, weight_I, eps, groups, gate_first)
    return _normed(rows(y), rows(z), weight_I, eps, groups, gate_first)[0]


def _normed(
    y: Tensor, z: Tensor, weight_I: Tensor, eps: float, groups: int, gate_first: bool
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """The norm, one over the root mean squares, and the sizes of the call."""
    out = torch.empty(y.shape, dtype=y.dtype)
    inverse = weight_I.new_empty(*y.shape[:-1], groups)
    sizes = (out.numel() // out.shape[-1], out.shape[-1], groups, y.stride(-2), z.stride(-2), gate_first)
    call("gated_norm", "forward", y.dtype, y, z, weight_I, out, inverse, *sizes, eps, numbers=out.numel())
    return out, inverse, sizes


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight_I: Tensor, eps: float, groups: int, gate_first: bool) -> Tensor:
        y, z = rows(y), rows(z)
        out, inverse, ctx.sizes = _normed(y, z, weight_I, eps, groups, gate_first)
        ctx.save_for_backward(y, z, weight_I, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight_I, inverse = ctx.saved_tensors
        dy, dz = (torch.empty(y.shape, dtype=y.dtype) for _ in range(2))
        dweight = weight_I.new_empty(library("gated_norm").parts_f32(), weight_I.shape[0])
        call("gated_norm", "backward", y.dtype, grads[0].contiguous(), y, z, weight_I, inverse, dy, dz, dweight, *ctx.sizes)
        return dy, dz, dweight.sum(0), None, None, None
