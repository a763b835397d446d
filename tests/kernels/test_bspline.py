"""B-splines against scipy's, and the layers made of them against their definition."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from tests.kernels.test_torch_backends import assert_same, drawn
from zexp.kernels.activation.names import Gate
from zexp.kernels.bspline import reference
from zexp.kernels.bspline.torch_backend import bspline, kan_linear

GRIDS = [(1, 1, 1.0), (1, 4, 0.3), (2, 3, 1.0), (3, 5, 1.0), (3, 20, 2.5), (4, 2, 1.0), (5, 5, 1.0)]
every_grid = pytest.mark.parametrize(("order", "grid", "half_range"), GRIDS, ids=lambda value: f"{value:g}")


@every_grid
def test_bases_are_scipys(order, grid, half_range):
    x = np.linspace(-3 * half_range, 3 * half_range, 211)  # no knot among them: scipy's bases of order 1 have no ends
    knots = reference.knots(order, grid, half_range)
    ours = bspline(torch.from_numpy(x)[:, None], order, grid, half_range)[..., 0].numpy()
    for number in range(grid + order):
        wanted = BSpline.basis_element(knots[number : number + order + 2], extrapolate=False)(x)
        np.testing.assert_allclose(ours[:, number], np.nan_to_num(wanted), rtol=0, atol=1e-12)


@every_grid
def test_bases_sum_to_one_on_the_range_and_are_zero_far_from_it(order, grid, half_range):
    x = torch.linspace(-half_range, half_range, 101)[:, None]  # fp32
    torch.testing.assert_close(bspline(x, order, grid, half_range).sum(1), torch.ones_like(x), rtol=0, atol=2e-6)
    end = half_range * (1 + 2 * order / grid) * 1.0001
    far = torch.tensor([[-end], [end], [1e30], [-torch.inf]])
    assert not bspline(far, order, grid, half_range).any()


@pytest.mark.parametrize("base", get_args(Gate))
@every_grid
def test_layer(order, grid, half_range, base):
    x, weight = drawn((2, 7, 3), (4, 3 * (1 + grid + order)))
    options = {"order": order, "grid": grid, "half_range": half_range, "base": base}
    assert_same(
        lambda *two: kan_linear(*two, **options), lambda *two: reference.kan_linear(*two, **options), (x, weight)
    )


def test_gradcheck():
    x, weight = drawn((1, 5, 2), (2, 2 * 9))
    assert torch.autograd.gradcheck(
        lambda *two: kan_linear(*two, order=3, grid=5, half_range=1.0, base="silu"), (x, weight)
    )


def test_rows_in_several_parts(monkeypatch):
    monkeypatch.setattr("zexp.kernels.bspline.torch_backend.PART_ELEMENTS", 3 * 9 * 4)
    options = {"order": 3, "grid": 5, "half_range": 1.0, "base": "silu"}
    assert_same(
        lambda *two: kan_linear(*two, **options),
        lambda *two: reference.kan_linear(*two, **options),
        drawn((2, 7, 4), (3, 4 * 9)),
    )


def test_autocast_lowers_the_product_and_not_the_bases():
    x, weight = (tensor.detach().float().requires_grad_() for tensor in drawn((2, 7, 4), (3, 4 * 9)))
    options = {"order": 3, "grid": 5, "half_range": 1.0, "base": "silu"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = kan_linear(x, weight, **options)
    assert out.dtype == torch.bfloat16
    wanted = reference.kan_linear(x, weight, **options)
    torch.testing.assert_close(out.float(), wanted, rtol=2**-6, atol=0.05)
    out.sum().backward()
    dx, dweight = torch.autograd.grad(wanted.sum(), (x, weight))
    torch.testing.assert_close(x.grad, dx, rtol=2**-5, atol=0.1)
    torch.testing.assert_close(weight.grad, dweight, rtol=2**-6, atol=0.05)
