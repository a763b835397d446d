"""A Kolmogorov-Arnold layer as one matrix product, with a hand-written gradient that keeps its input alone.

M rows · I inputs · O outputs · J bases.

On a uniform grid every basis function is one function, shifted. In units of the grid's step it is, around its middle,
    (1/k!) Σ_j (-1)^j binomial(k + 1, j) max(0, (k + 1) / 2 - j - |u|)^k,   j = 0 .. k / 2:
the truncated powers from the nearer end, so that it is exactly 0 outside of its support and nothing large cancels (de
Boor, A Practical Guide to Splines, chapter IX). Two powers make a cubic: less work than the recursion of Cox and de Boor,
and than putting the few bases that are not 0 into place.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zexp.kernels.activation.names import Gate
from zexp.kernels.activation.torch_backend import mlp_activation, mlp_activation_and_gradient
from zexp.kernels.precision import at_least_fp32

PART_ELEMENTS = 1 << 20  # of the bases of some rows: they are made and used up at once


class _Splines(NamedTuple):
    order: int
    grid: int
    half_range: float
    base: Gate

    @property
    def step(self) -> float:
        return 2 * self.half_range / self.grid


def kan_linear(x: Tensor, weight: Tensor, *, order: int, grid: int, half_range: float, base: Gate) -> Tensor:
    """Each output the sum over inputs of w · base(x) + Σ_j c_j B_j(x): (…, O) from x of (…, I).

    B_j: the J = grid + order B-splines of that order over a uniform grid of `grid` intervals on [-half_range, half_range]
    that goes on for `order` intervals on either side. They sum to 1 on the range, fade outside of it and are 0 beyond
    half_range · (1 + 2 order / grid), where w · base(x) alone is left.
    weight: (O, (1 + J) I): all w of an output, then c_0 of all inputs, c_1, …. order: 1 to 5.
    The bases are made in fp32 at least; the product runs in x's dtype, or autocast's. Source: KAN (arXiv:2404.19756).
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    with torch.autocast(x.device.type, enabled=False):
        out_MO = _KanLinear.apply(x.flatten(0, -2), weight, _Splines(order, grid, half_range, base), dtype)
    return out_MO.unflatten(0, x.shape[:-1])


def bspline(x: Tensor, order: int, grid: int, half_range: float) -> Tensor:
    """The bases at x of (M, I): (M, J, I), without a gradient."""
    bases_MJI = x.new_empty(x.shape[0], grid + order, x.shape[1])
    _fill(x, _Splines(order, grid, half_range, "silu"), bases_MJI, None)
    return bases_MJI


def _fill(x_MI: Tensor, splines: _Splines, bases_MJI: Tensor, slopes_MJI: Tensor | None) -> None:
    """Writes the bases and, where wanted, their derivatives."""
    k = splines.order
    first = -splines.half_range + (1 - k) / 2 * splines.step  # the middle of the first basis
    middles_J = torch.arange(bases_MJI.shape[1], dtype=x_MI.dtype, device=x_MI.device)
    distance_MJI = ((x_MI - first) / splines.step)[:, None] - middles_J[:, None]
    from_middle_MJI = distance_MJI.abs()
    for j in range(k // 2 + 1):
        factor = (-1) ** j * math.comb(k + 1, j) / math.factorial(k)
        inside = torch.sub((k + 1) / 2 - j, from_middle_MJI).clamp_(min=0)
        lower = (inside > 0).to(x_MI.dtype) if k == 1 else inside  # inside^(k - 1)
        for _ in range(k - 2):
            lower = lower * inside
        if j == 0:
            torch.mul(lower, inside, out=bases_MJI).mul_(factor)
        else:
            bases_MJI.addcmul_(lower, inside, value=factor)
        if slopes_MJI is None:
            continue
        if j == 0:
            torch.mul(lower, -k * factor / splines.step, out=slopes_MJI)
        else:
            slopes_MJI.add_(lower, alpha=-k * factor / splines.step)
    if slopes_MJI is not None:
        slopes_MJI.mul_(distance_MJI.sign_())


def _parts(x_MI: Tensor, planes: int) -> list[slice]:
    rows = max(1, PART_ELEMENTS // (planes * x_MI.shape[1]))
    return [slice(start, min(start + rows, len(x_MI))) for start in range(0, len(x_MI), rows)]


class _KanLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight: Tensor, splines: _Splines, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x_MI, weight)
        ctx.splines, ctx.dtype = splines, dtype
        x, across = at_least_fp32(x_MI), weight.to(dtype).t()
        planes = 1 + splines.grid + splines.order
        out_MO = torch.empty(len(x), weight.shape[0], dtype=dtype, device=x.device)
        for part in _parts(x, planes):
            features = x.new_empty(part.stop - part.start, planes, x.shape[1])
            features[:, 0] = mlp_activation(x[part], splines.base)
            _fill(x[part], splines, features[:, 1:], None)
            torch.mm(features.flatten(1).to(dtype), across, out=out_MO[part])
        return out_MO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_MI, weight = ctx.saved_tensors
        splines, dtype = ctx.splines, ctx.dtype
        x, dout_MO, high = at_least_fp32(x_MI), grads[0].to(dtype), weight.to(dtype)
        planes = 1 + splines.grid + splines.order
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        for part in _parts(x, planes):
            features = x.new_empty(part.stop - part.start, planes, x.shape[1])
            slopes = torch.empty_like(features)
            features[:, 0], slopes[:, 0] = mlp_activation_and_gradient(x[part], torch.ones_like(x[part]), splines.base)
            _fill(x[part], splines, features[:, 1:], slopes[:, 1:])
            dout = dout_MO[part]
            dweight += torch.mm(dout.t(), features.flatten(1).to(dtype))
            dfeatures = torch.mm(dout, high).to(x.dtype).view_as(features)
            torch.sum(dfeatures.mul_(slopes), dim=1, out=dx[part])
        return dx.to(x_MI.dtype), dweight, None, None
