"""RMSNorm by kernel.cpp. M rows · D width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zexp.kernels.cpp.library import SUFFIX, call, library, not_taken
from zexp.kernels.fused import Fused


def cpp() -> dict[str, Fused]:
    library("rms_norm")
    return {"rms_norm": Fused(rms_norm, refuses)}


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As the torch backend's."""
    weight_D = weight_D.float().contiguous()
    return _RmsNorm.apply(x, weight_D, eps) if torch.is_grad_enabled() else _normed(x.contiguous(), weight_D, eps)[0]


def refuses(x: Tensor, weight_D: Tensor, eps: float) -> str | None:
    if weight_D.shape != x.shape[-1:]:
        return "a weight of another width"  # which torch's form will not take either, and says so
    return not_taken(activations=(x,), whole=(weight_D,), taken=SUFFIX)


def _normed(x_MD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and one over the root mean square of each row."""
    y_MD, inverse_M = torch.empty_like(x_MD), x_MD.new_empty(x_MD.shape[:-1], dtype=torch.float32)
    sizes = (inverse_M.numel(), x_MD.shape[-1])
    call("rms_norm", "forward", x_MD.dtype, x_MD, weight_D, y_MD, inverse_M, *sizes, float(eps), numbers=x_MD.numel())
    return y_MD, inverse_M


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_MD = x.contiguous()
        y_MD, inverse_M = _normed(x_MD, weight_D, eps)
        ctx.save_for_backward(x_MD, weight_D, inverse_M)
        return y_MD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_MD, weight_D, inverse_M = ctx.saved_tensors
        dx_MD = torch.empty_like(x_MD)
        parts = library("rms_norm").parts_f32()
        dweight = weight_D.new_empty(parts, weight_D.shape[0])
        rows, width = inverse_M.numel(), x_MD.shape[-1]
        call("rms_norm", "backward", x_MD.dtype, grads[0].contiguous(), x_MD, weight_D, inverse_M, dx_MD, dweight, rows, width)
        return dx_MD, dweight.sum(0), None
