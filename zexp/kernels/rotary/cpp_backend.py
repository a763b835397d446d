"""Rotary position embedding by kernel.cpp, one pass in either direction; angles' cosines and sines stay in fp32.

B batch · T positions · H heads · P head width · R turned channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zexp.kernels.cpp.library import call, library, not_taken
from zexp.kernels.fused import Fused
from zexp.kernels.rotary.scaling import RopeScaling
from zexp.kernels.rotary.torch_backend import angles


def cpp() -> dict[str, Fused]:
    library("rotary")
    return {"rotary": Fused(rotary, refuses)}


def rotary(
    x_BTHP: Tensor, theta: float, *, turned: int | None = None, start: int = 0, scaling: RopeScaling | None = None
) -> Tensor:
    """As the torch backend's."""
    width, length = x_BTHP.shape[3] if turned is None else turned, x_BTHP.shape[1]
    cos, sin = angles(start, length, width, theta, scaling, x_BTHP.device, torch.float32)
    return _Rotary.apply(x_BTHP, cos, sin) if torch.is_grad_enabled() else _turned(x_BTHP, cos, sin, 1.0)


def refuses(
    x_BTHP: Tensor, theta: float, *, turned: int | None = None, start: int = 0, scaling: RopeScaling | None = None
) -> str | None:
    return not_taken(activations=(x_BTHP,))


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHP: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.angles = cos, sin
        return _turned(x_BTHP, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.angles
        return _turned(grads[0], cos, sin, -1.0), None, None


def _turned(x_BTHP: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    x = x_BTHP if x_BTHP.stride(3) == 1 else x_BTHP.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    sizes = (*x.shape, 2 * cos.shape[-1], *x.stride()[:3])
    call("rotary", "turn", x.dtype, x, cos, sin, y, *sizes, direction, numbers=y.numel())
    return y
