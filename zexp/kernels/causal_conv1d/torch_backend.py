"""Causal depthwise convolution, with SiLU or without, as K shifted multiply-adds over (batch, time, channel).

B batch · T positions · C channels · K conv width. F.conv1d wants (B, C, T): two transposes and a slower depthwise loop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zexp.kernels.documents import Documents
from zexp.kernels.precision import at_least_fp32


def causal_conv1d(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    documents: Documents | None = None,
    *,
    silu: bool = True,
) -> Tensor:
    """conv(x) + bias, (B, T, C), in x's dtype, through SiLU unless told otherwise.

    weight[:, K - 1] meets the position itself, weight[:, 0] the one K - 1 before it; positions before the start or of
    another document count as zero.
    """
    return _CausalConv1d.apply(x_BTC, weight_CK, bias_C, documents, silu)


@torch.no_grad()
def causal_conv1d_continue(
    x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, tail_BKC: Tensor, *, silu: bool = True
) -> tuple[Tensor, Tensor]:
    """The same after the last K inputs (zeros before the first), and the last K inputs then. No gradient."""
    joined = torch.cat((tail_BKC, x_BTC.to(tail_BKC.dtype)), dim=1)
    width, length = weight_CK.shape[1], x_BTC.shape[1]
    tail = joined[:, length:]
    if length > 1:
        return causal_conv1d(joined, weight_CK, bias_C, silu=silu)[:, width:].to(x_BTC.dtype), tail
    y = (at_least_fp32(tail) * weight_CK.t()).sum(1)
    y = y if bias_C is None else y + bias_C
    return (torch.nn.functional.silu(y) if silu else y)[:, None].to(x_BTC.dtype), tail


def _shifts(length: int, width: int) -> range:
    return range(1, min(width, length))


def _masked(x: Tensor, documents: Documents | None, shift: int) -> Tensor:
    return x if documents is None else x * documents.same_as_before(shift)[:, :, None]


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, documents: Documents | None, silu: bool
    ) -> Tensor:
        x = at_least_fp32(x_BTC)
        taps_KC = weight_CK.t().contiguous()
        length, last = x.shape[1], weight_CK.shape[1] - 1
        y = x * taps_KC[last] if bias_C is None else torch.addcmul(bias_C, x, taps_KC[last])
        for s in _shifts(length, last + 1):
            y[:, s:].addcmul_(_masked(x[:, : length - s], documents, s), taps_KC[last - s])
        ctx.documents, ctx.biased = documents, bias_C is not None
        if not silu:
            ctx.save_for_backward(x_BTC, taps_KC, None, None)
            return y.to(x_BTC.dtype)
        sigmoid = y.sigmoid()
        out = y.mul_(sigmoid)
        ctx.save_for_backward(x_BTC, taps_KC, sigmoid, out)
        return out.to(x_BTC.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        x_BTC, taps_KC, sigmoid, out = ctx.saved_tensors
        x, dout, documents = at_least_fp32(x_BTC), at_least_fp32(grads[0]), ctx.documents
        length, last = x.shape[1], taps_KC.shape[0] - 1
        dy = dout
        if out is not None:
            dy = torch.addcmul(out, out, sigmoid, value=-1).add_(sigmoid).mul_(dout)  # slope of silu: s + y·s·(1 - s)
        dx = dy * taps_KC[last]
        dtaps_KC = torch.zeros_like(taps_KC)
        dtaps_KC[last] = (dy * x).flatten(0, 1).sum(0)
        for s in _shifts(length, last + 1):
            later = _masked(dy[:, s:], documents, s)
            dx[:, : length - s].addcmul_(later, taps_KC[last - s])
            dtaps_KC[last - s] = (later * x[:, : length - s]).sum((0, 1))
        dbias_C = dy.flatten(0, 1).sum(0) if ctx.biased else None
        return dx.to(x_BTC.dtype), dtaps_KC.t(), dbias_C, None, None
