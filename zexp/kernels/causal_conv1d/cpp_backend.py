"""The causal depthwise convolution by kernel.cpp. B batch · T positions · C channels · K conv width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zexp.kernels.cpp.library import call, library, not_taken
from zexp.kernels.documents import Documents
from zexp.kernels.fused import Fused


def cpp() -> dict[str, Fused]:
    library("causal_conv1d")
    return {"causal_conv1d": Fused(causal_conv1d, refuses)}


def causal_conv1d(
    x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, documents: Documents | None = None, *, silu: bool = True
) -> Tensor:
    """As the torch backend's."""
    return _CausalConv1d.apply(x_BTC, weight_CK, bias_C, documents, silu)


def refuses(
    x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, documents: Documents | None = None, *, silu: bool = True
) -> str | None:
    return not_taken(activations=(x_BTC,), whole=(weight_CK, bias_C))


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, documents: Documents | None, silu: bool
    ) -> Tensor:
        x = x_BTC if x_BTC.stride(2) == 1 else x_BTC.contiguous()
        taps_KC = weight_CK.t().contiguous()
        ctx.ids = None if documents is None else documents.ids_int64()
        ctx.silu = silu
        ctx.save_for_backward(x, taps_KC, bias_C)
        y = torch.empty(x.shape, dtype=x.dtype)
        call("causal_conv1d", "forward", x.dtype, x, taps_KC, bias_C, ctx.ids, y, *_sizes(x, taps_KC), silu)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        x, taps_KC, bias_C = ctx.saved_tensors
        dy, batch = grads[0].contiguous(), x.shape[0]
        dx = torch.empty(x.shape, dtype=x.dtype)
        dtaps_BKC, dbias_BC = taps_KC.new_empty(batch, *taps_KC.shape), taps_KC.new_empty(batch, taps_KC.shape[1])
        sizes = _sizes(x, taps_KC)
        call("causal_conv1d", "backward", x.dtype, dy, x, taps_KC, bias_C, ctx.ids, dx, dtaps_BKC, dbias_BC, *sizes, ctx.silu)
        return dx, dtaps_BKC.sum(0).t(), None if bias_C is None else dbias_BC.sum(0), None, None


def _sizes(x_BTC: Tensor, taps_KC: Tensor) -> tuple[int, ...]:
    return (*x_BTC.shape, taps_KC.shape[0], x_BTC.stride(1), x_BTC.stride(0))
