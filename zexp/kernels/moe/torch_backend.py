"""Experts over tokens sorted by expert: as many matrix products as experts, and no token dropped.

M tokens · D model width · E experts · K chosen for a token · N = K · M choices · F expert width · H rows of `up`: F, or
2F with a gate. Of all choices only H numbers each are kept: activations are computed again in the backward pass, where
a slice of one expert fits into the cache and its two products cost some twenty times as much. Choices go to their tokens
by gathers in both directions, in the order of the K: nothing is added in an order that depends on threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zexp.kernels.activation.names import Activation
from zexp.kernels.activation.torch_backend import mlp_activation, mlp_activation_and_gradient


def moe(
    x_MD: Tensor, chosen_KM: Tensor, weights_KM: Tensor, up_EHD: Tensor, down_EDF: Tensor, activation: Activation
) -> Tensor:
    """(M, D): the sum over the K chosen experts e of weight · down_e act(up_e x), in x's dtype.

    chosen_KM: expert numbers, K different ones for each token. A gated unit's up holds the gate's rows first.
    The products run in x's dtype (or autocast's), the sum over the K in fp32 at least.
    """
    return _Moe.apply(x_MD, weights_KM, up_EHD, down_EDF, chosen_KM, activation)


def load(chosen_KM: Tensor, experts: int) -> Tensor:
    """(E,) integers: how often each expert is chosen."""
    return torch.bincount(chosen_KM.flatten(), minlength=experts)


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
        device = x_MD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_MD.dtype
        with torch.autocast(device, enabled=False):
            up, down = up_EHD.to(dtype), down_EDF.to(dtype)
            order_N = chosen_KM.flatten().argsort(stable=True)
            counts = load(chosen_KM, up.shape[0]).tolist()
            rows_ND = x_MD.to(dtype).index_select(0, order_N % x_MD.shape[0])
            hidden_NH = rows_ND.new_empty(rows_ND.shape[0], up.shape[1])
            for expert, part in slices(counts):
                torch.mm(rows_ND[part], up[expert].t(), out=hidden_NH[part])
                torch.mm(mlp_activation(hidden_NH[part], activation), down[expert].t(), out=rows_ND[part])
            ctx.save_for_backward(x_MD, weights_KM, up, down, order_N, hidden_NH)
            ctx.counts, ctx.activation = counts, activation
            ctx.parameter_dtypes = up_EHD.dtype, down_EDF.dtype
            return _combined(rows_ND, weights_KM, _places(order_N)).to(x_MD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        x_MD, weights_KM, up, down, order_N, hidden_NH = ctx.saved_tensors
        dtype, places_N = up.dtype, _places(order_N)
        with torch.autocast(x_MD.device.type, enabled=False):
            token_N = order_N % x_MD.shape[0]
            weight_N1 = weights_KM.flatten()[order_N].to(dtype)[:, None]
            rows_ND = x_MD.to(dtype).index_select(0, token_N).mul_(weight_N1)
            dout_ND = grads[0].to(dtype).index_select(0, token_N)
            dweight_N = torch.empty_like(weights_KM).flatten()
            dup, ddown = torch.zeros_like(up), torch.zeros_like(down)
            for expert, part in slices(ctx.counts):
                dacted = dout_ND[part] @ down[expert]  # without the weight, which the others have as a factor of D rows
                acted, dhidden = mlp_activation_and_gradient(hidden_NH[part], dacted, ctx.activation)
                dweight_N[part] = dacted.mul_(acted).sum(-1, dtype=dweight_N.dtype)
                torch.mm(dout_ND[part].mul_(weight_N1[part]).t(), acted, out=ddown[expert])
                torch.mm(dhidden.t(), rows_ND[part], out=dup[expert])
                torch.mm(dhidden, up[expert], out=rows_ND[part])
            dx_MD = _combined(rows_ND, weights_KM, places_N).to(x_MD.dtype)
            dweights_KM = dweight_N[places_N].view_as(weights_KM)
        up_dtype, down_dtype = ctx.parameter_dtypes
        return dx_MD, dweights_KM, dup.to(up_dtype), ddown.to(down_dtype), None, None


def slices(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """The rows of each expert that has any."""
    end = 0
    for expert, count in enumerate(counts):
        start, end = end, end + count
        if count:
            yield expert, slice(start, end)


def _places(order_N: Tensor) -> Tensor:
    """Where each choice went in the sorted order."""
    places_N = torch.empty_like(order_N)
    places_N[order_N] = torch.arange(order_N.shape[0], device=order_N.device)
    return places_N


def _combined(rows_ND: Tensor, weights_KM: Tensor, places_N: Tensor) -> Tensor:
    """(M, D) in the weights' dtype: each token's rows times their weights, summed."""
    out_MD = None
    for weight_M, place_M in zip(weights_KM, places_N.view_as(weights_KM), strict=True):
        row_MD = rows_ND.index_select(0, place_M).to(weights_KM.dtype)
        out_MD = row_MD.mul_(weight_M[:, None]) if out_MD is None else out_MD.addcmul_(row_MD, weight_M[:, None])
    assert out_MD is not None, "at least one expert is chosen"
    return out_MD
