"""Experts over tokens sorted by expert: matrix products by torch, and kernel.cpp around them.

M tokens · D model width · E experts · K chosen for a token · N: the K · M choices, each expert's filled up by rows of zeros · F expert
width · H rows of `up`: F, or 2F with a gate. The scheme is the torch backend's. Of all choices H numbers each are kept in fp32; in bf16,
whose products are quick, nothing is, and the backward pass computes `up` again: two products more to the nine that there are. No copy of
the weights is kept: an expert's matrices are rounded again where they are used again.

How many tokens an expert gets is new each time, and torch's library compiles a product for every size that it has not seen, which takes
time and about 1 MB. So rows are filled up to few sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zexp.kernels.activation.names import GATED, PLAIN, Activation
from zexp.kernels.cpp.library import call, library, not_taken, product_dtype
from zexp.kernels.fused import Fused
from zexp.kernels.moe.torch_backend import load, slices

STEPS, SMALLEST = 4, 8  # see _filled


def cpp() -> dict[str, Fused]:
    library("moe")
    return {"moe": Fused(moe, refuses)}


def moe(
    x_MD: Tensor, chosen_KM: Tensor, weights_KM: Tensor, up_EHD: Tensor, down_EDF: Tensor, activation: Activation
) -> Tensor:
    """As the torch backend's."""
    return _Moe.apply(x_MD, weights_KM, up_EHD, down_EDF, chosen_KM, activation)


def refuses(
    x_MD: Tensor, chosen_KM: Tensor, weights_KM: Tensor, up_EHD: Tensor, down_EDF: Tensor, activation: Activation
) -> str | None:
    if (why := not_taken(activations=(x_MD,), whole=(weights_KM, up_EHD, down_EDF))) is not None:
        return why
    return not_taken(activations=(x_MD.new_empty(0, dtype=product_dtype(x_MD)),))


class _Moe(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        weights_KM: Tensor,
        up_EHD: Tensor,
        down_EDF: Tensor,
        chosen_KM: Tensor,
        activation: Activation,
    ) -> Tensor:
        dtype = product_dtype(x_MD)
        counts, token_N, places_KM = _layout(chosen_KM, up_EHD.shape[0])
        act = (PLAIN.index(GATED.get(activation, activation)), activation in GATED)  # type: ignore[arg-type]
        with torch.autocast("cpu", enabled=False):
            x, weights_KM = x_MD.to(dtype).contiguous(), weights_KM.contiguous()
            rows_ND = _gathered(x, token_N)
            keeps = dtype == torch.float32
            hidden = rows_ND.new_empty(len(rows_ND) if keeps else max(counts), up_EHD.shape[1])
            acted = rows_ND.new_empty(max(counts), down_EDF.shape[2])
            for expert, part in slices(counts):
                rows_nD = rows_ND[part]
                hidden_nH, acted_nF = hidden[part] if keeps else hidden[: len(rows_nD)], acted[: len(rows_nD)]
                torch.mm(rows_nD, up_EHD[expert].to(dtype).t(), out=hidden_nH)
                call("moe", "activate", dtype, hidden_nH, acted_nF, *acted_nF.shape, *act)
                torch.mm(acted_nF, down_EDF[expert].to(dtype).t(), out=rows_nD)
            out_MD = _combined(rows_ND, places_KM, weights_KM)
        ctx.save_for_backward(x, weights_KM, up_EHD, down_EDF, token_N, places_KM, hidden if keeps else None)
        ctx.counts, ctx.act, ctx.x_dtype = counts, act, x_MD.dtype
        return out_MD.to(x_MD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        x, weights_KM, up_EHD, down_EDF, token_N, places_KM, hidden_NH = ctx.saved_tensors
        dtype, counts = x.dtype, ctx.counts
        with torch.autocast("cpu", enabled=False):
            weight_N = weights_KM.new_zeros(token_N.shape)
            weight_N[places_KM.flatten()] = weights_KM.flatten()
            rows_ND = _gathered(x, token_N)
            dout_ND = _gathered(grads[0].to(dtype).contiguous(), token_N)
            dweight_N = torch.empty_like(weight_N)
            dup, ddown = torch.zeros_like(up_EHD), torch.zeros_like(down_EDF)
            dhidden, dacted = (rows_ND.new_empty(max(counts), width) for width in (up_EHD.shape[1], down_EDF.shape[2]))
            again = None if hidden_NH is not None else torch.empty_like(dhidden)
            for expert, part in slices(counts):
                rows_nD, dout_nD, up_HD = rows_ND[part], dout_ND[part], up_EHD[expert].to(dtype)
                dhidden_nH, dacted_nF = dhidden[: len(rows_nD)], dacted[: len(rows_nD)]
                hidden_nH = hidden_NH[part] if again is None else torch.mm(rows_nD, up_HD.t(), out=again[: len(rows_nD)])
                torch.mm(dout_nD, down_EDF[expert].to(dtype), out=dacted_nF)  # as if the weight were 1
                sizes = (*dacted_nF.shape, *ctx.act)
                call("moe", "activate_backward", dtype, hidden_nH, dacted_nF, weight_N[part], dhidden_nH, dweight_N[part], *sizes)
                acted_nF = dacted_nF  # in its place, with the weight
                ddown[expert] = dout_nD.t() @ acted_nF
                dup[expert] = dhidden_nH.t() @ rows_nD
                torch.mm(dhidden_nH, up_HD, out=rows_nD)
            dx_MD = _combined(rows_ND, places_KM, None)
            dweights_KM = dweight_N[places_KM.flatten()].view_as(weights_KM)
        return dx_MD.to(ctx.x_dtype), dweights_KM, dup, ddown, None, None


def _layout(chosen_KM: Tensor, experts: int) -> tuple[list[int], Tensor, Tensor]:
    """The rows of each expert; the token of each row, (N,), -1 = none; the row of each choice, (K, M)."""
    order = chosen_KM.flatten().argsort(stable=True)
    counts = load(chosen_KM, experts)
    filled = _filled(counts)
    shift_E = (filled - counts).cumsum(0) - (filled - counts)
    row = torch.arange(order.shape[0]) + shift_E.repeat_interleave(counts)
    token_N = torch.full((int(filled.sum()),), -1)
    token_N[row] = order % chosen_KM.shape[1]
    places_KM = torch.empty_like(order)
    places_KM[order] = row
    return filled.tolist(), token_N, places_KM.view(chosen_KM.shape)


def _filled(counts: Tensor) -> Tensor:
    """Counts rounded up: to steps of a power of two, STEPS of which there are from a power of two to the next."""
    power = torch.frexp(counts / STEPS).exponent - 1
    step = (2.0**power).long().clamp(min=SMALLEST)
    return (counts + step - 1) // step * step


def _gathered(x_MD: Tensor, token_N: Tensor) -> Tensor:
    out_ND = x_MD.new_empty(token_N.shape[0], x_MD.shape[1])
    call("moe", "gather", x_MD.dtype, x_MD, token_N, out_ND, *out_ND.shape)
    return out_ND


def _combined(rows_ND: Tensor, places_KM: Tensor, weights_KM: Tensor | None) -> Tensor:
    """(M, D) in fp32: the sum of each token's rows, times their weights where there are some."""
    choices, tokens = places_KM.shape
    out_MD = rows_ND.new_empty(tokens, rows_ND.shape[1], dtype=torch.float32)
    call("moe", "combine", rows_ND.dtype, rows_ND, places_KM, weights_KM, out_MD, *out_MD.shape, choices)
    return out_MD
