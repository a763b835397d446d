"""Activations of MLPs by kernel.cpp: the gradient is made of x alone."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zexp.kernels.activation.names import GATED, PLAIN, Activation, Gate
from zexp.kernels.cpp.library import call, library, not_taken
from zexp.kernels.fused import Fused


def cpp() -> dict[str, Fused]:
    library("activation")
    return {"mlp_activation": Fused(mlp_activation, refuses), "gated": Fused(gated, refuses_gated)}


def mlp_activation(x: Tensor, name: Activation) -> Tensor:
    """As the torch backend's."""
    return gated(x, GATED[name]) if name in GATED else _activated(x, cast(Gate, name), False)


def gated(x: Tensor, gate: Gate) -> Tensor:
    """As the torch backend's."""
    return _activated(x, gate, True)


def refuses(x: Tensor, name: Activation) -> str | None:
    return refuses_gated(x, GATED[name]) if name in GATED else not_taken(activations=(x,))


def refuses_gated(x: Tensor, gate: Gate) -> str | None:
    if x.shape[-1] % 2:
        return "rows that have no halves"  # which torch's form will not take either, and says so
    return not_taken(activations=(x,))


def _activated(x: Tensor, gate: Gate, is_gated: bool) -> Tensor:
    return _Activation.apply(x, gate, is_gated) if torch.is_grad_enabled() else _forward(x.contiguous(), gate, is_gated)[0]


def _forward(x: Tensor, gate: Gate, is_gated: bool) -> tuple[Tensor, tuple[int, ...]]:
    """What becomes of x, and the sizes of the call."""
    width = x.shape[-1] // 2 if is_gated else x.shape[-1]
    y = x.new_empty(*x.shape[:-1], width)
    sizes = (x.numel() // max(1, x.shape[-1]), width, PLAIN.index(gate), is_gated)
    call("activation", "forward", x.dtype, x, y, *sizes, numbers=y.numel())
    return y, sizes


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Gate, is_gated: bool) -> Tensor:
        x = x.contiguous()
        y, ctx.sizes = _forward(x, gate, is_gated)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        call("activation", "backward", x.dtype, grads[0].contiguous(), x, dx, *ctx.sizes)
        return dx, None, None
