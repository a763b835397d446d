"""Token shift with a hand-written gradient that keeps the input alone. B batch · T positions · D width · S mixes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zexp.kernels.documents import Documents
from zexp.kernels.precision import at_least_fp32


def token_shift(x_BTD: Tensor, mix_SD: Tensor, documents: Documents | None = None) -> tuple[Tensor, ...]:
    """For each of the S mix vectors x_t + (x_{t-1} - x_t) * mix, (B, T, D) in x's dtype.

    Before the first position of a row or a document stands zero. Source: RWKV-7 (arXiv:2503.14456), section 4.1.
    """
    return _TokenShift.apply(x_BTD, mix_SD, documents)


@torch.no_grad()
def token_shift_continue(x_BTD: Tensor, mix_SD: Tensor, last_BD: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """The same after a position (zeros before the first), and the last position then. No gradient."""
    x = at_least_fp32(x_BTD)
    difference = torch.cat((last_BD[:, None].to(x.dtype), x[:, :-1]), dim=1).sub_(x)
    return tuple(torch.addcmul(x, difference, mix).to(x_BTD.dtype) for mix in mix_SD), x_BTD[:, -1].to(last_BD.dtype)


def _difference(x_BTD: Tensor, documents: Documents | None) -> Tensor:
    """What stands before each position, less the position."""
    before = x_BTD[:, :-1] if documents is None else x_BTD[:, :-1] * documents.same_as_before(1)[:, :, None]
    return torch.cat((torch.zeros_like(x_BTD[:, :1]), before), dim=1).sub_(x_BTD)


class _TokenShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, mix_SD: Tensor, documents: Documents | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_BTD, mix_SD)
        ctx.documents = documents
        x = at_least_fp32(x_BTD)
        difference = _difference(x, documents)
        return tuple(torch.addcmul(x, difference, mix).to(x_BTD.dtype) for mix in mix_SD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_BTD, mix_SD = ctx.saved_tensors
        x, dys = at_least_fp32(x_BTD), [at_least_fp32(grad) for grad in grads]
        difference = _difference(x, ctx.documents)
        dmix_SD = torch.stack([(dy * difference).flatten(0, 1).sum(0) for dy in dys])
        dx, dbefore = dys[0].clone(), dys[0] * mix_SD[0]
        for dy, mix in zip(dys[1:], mix_SD[1:], strict=True):
            dx += dy
            dbefore.addcmul_(dy, mix)
        dx -= dbefore
        dbefore = dbefore[:, 1:]
        dx[:, :-1] += dbefore if ctx.documents is None else dbefore * ctx.documents.same_as_before(1)[:, :, None]
        return dx.to(x_BTD.dtype), dmix_SD.to(mix_SD.dtype), None
