"""The selective scan by kernel.cpp.

B batch · T positions · I inner channels · H heads · N state size · M segments of positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zexp.kernels.cpp.library import call, library, not_taken
from zexp.kernels.documents import Documents
from zexp.kernels.fused import Fused
from zexp.kernels.selective_scan.sizes import SEGMENT


def cpp() -> dict[str, Fused]:
    library("selective_scan")
    return {"selective_scan": Fused(selective_scan, refuses)}


def selective_scan(
    x_BTI: Tensor,
    dt_BTI: Tensor,
    a_IN: Tensor,
    b_BTHN: Tensor,
    c_BTHN: Tensor,
    d_I: Tensor,
    dt_bias_I: Tensor | None = None,
    z_BTI: Tensor | None = None,
    *,
    documents: Documents | None = None,
) -> Tensor:
    """As the torch backend's."""
    inputs = (x_BTI, dt_BTI, a_IN, b_BTHN, c_BTHN, d_I, dt_bias_I, z_BTI)
    kept = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    return _SelectiveScan.apply(*inputs, None if documents is None else documents.starts(), kept)


def refuses(
    x_BTI: Tensor,
    dt_BTI: Tensor,
    a_IN: Tensor,
    b_BTHN: Tensor,
    c_BTHN: Tensor,
    d_I: Tensor,
    dt_bias_I: Tensor | None = None,
    z_BTI: Tensor | None = None,
    *,
    documents: Documents | None = None,
) -> str | None:
    whole = (a_IN, d_I, dt_bias_I, dt_BTI if dt_BTI.dtype != x_BTI.dtype else None)
    return not_taken(activations=(x_BTI, b_BTHN, c_BTHN, *(() if z_BTI is None else (z_BTI,))), whole=whole)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTI: Tensor,
        dt_BTI: Tensor,
        a_IN: Tensor,
        b_BTHN: Tensor,
        c_BTHN: Tensor,
        d_I: Tensor,
        dt_bias_I: Tensor | None,
        z_BTI: Tensor | None,
        starts_BT: Tensor | None,
        kept: bool,
    ) -> Tensor:
        x, dt, a, d = (tensor.contiguous() for tensor in (x_BTI, dt_BTI, a_IN, d_I))
        b, c = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (b_BTHN, c_BTHN))
        z = z_BTI if z_BTI is None or z_BTI.stride(-1) == 1 else z_BTI.contiguous()
        bias = None if dt_bias_I is None else dt_bias_I.contiguous()
        states_BMNI = None
        if kept:
            segments = -(-x.shape[1] // SEGMENT)
            states_BMNI = torch.empty(x.shape[0], segments, a.shape[1], x.shape[2])
            ctx.save_for_backward(x, dt, a, b, c, d, bias, z, states_BMNI)
            ctx.starts_BT = starts_BT
        y = torch.empty_like(x)
        call(
            "selective_scan", _named("forward", x, dt), x.dtype,
            x, dt, a, b, c, d, bias, z, starts_BT, y, states_BMNI, *_sizes(x, b, c, z),
        )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, a, b, c, d, bias, z, states_BMNI = ctx.saved_tensors
        dx, ddt, db, dc = (torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (x, dt, b, c))
        da_BIN, dd_BI = a.new_empty(x.shape[0], *a.shape), d.new_empty(x.shape[0], *d.shape)
        dbias_BI = None if bias is None else torch.empty_like(dd_BI)
        dz = None if z is None else torch.empty(z.shape, dtype=z.dtype)
        call(
            "selective_scan", _named("backward", x, dt), x.dtype,
            grads[0].contiguous(), x, dt, a, b, c, d, bias, z, ctx.starts_BT, states_BMNI,
            dx, ddt, da_BIN, db, dc, dd_BI, dbias_BI, dz, *_sizes(x, b, c, z),
        )  # fmt: skip
        dbias = None if dbias_BI is None else dbias_BI.sum(0)
        return dx, ddt, da_BIN.sum(0), db, dc, dd_BI.sum(0), dbias, dz, None, None


def _named(function: str, x: Tensor, dt: Tensor) -> str:
    """forward_bf16 takes dt in fp32, forward_all_bf16 in bf16."""
    return f"{function}_all" if dt.dtype == torch.bfloat16 == x.dtype else function


def _sizes(x_BTI: Tensor, b_BTHN: Tensor, c_BTHN: Tensor, z_BTI: Tensor | None) -> tuple[int, ...]:
    batch, length, heads, state = b_BTHN.shape
    strides = (*b_BTHN.stride()[:3], *c_BTHN.stride()[:3], *(x_BTI if z_BTI is None else z_BTI).stride()[:2])
    return (batch, length, heads, x_BTI.shape[2] // heads, state, *strides, SEGMENT)
