"""The rotary embedding in C++ against the torch backend in fp64."""

from __future__ import annotations

import pytest
import torch

from zexp.kernels.cpp.compiler import compiler
from zexp.kernels.rotary.cpp_backend import refuses, rotary
from zexp.kernels.rotary.scaling import RopeScaling
from zexp.kernels.rotary.torch_backend import rotary as on_torch

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

SCALING = RopeScaling(factor=8.0, low_turns=1.0, high_turns=4.0, original_positions=32)


def results(function, x, **options):
    own = x.detach().requires_grad_()
    y = function(own, 10_000.0, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)
    return y.detach(), torch.autograd.grad(y, own, weights)[0]


@pytest.mark.parametrize("scaling", [None, SCALING], ids=["as it is", "scaled"])
@pytest.mark.parametrize("start", [0, 7, 100_000])
@pytest.mark.parametrize(("width", "turned"), [(64, None), (20, None), (64, 16), (10, 2)])
def test_values_and_gradients_are_those_of_the_torch_backend(width, turned, start, scaling):
    x = torch.randn(2, 9, 3, width, generator=torch.Generator().manual_seed(width))
    options = {"turned": turned, "start": start, "scaling": scaling}
    for mine, true in zip(results(rotary, x, **options), results(on_torch, x.double(), **options), strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-6, atol=1e-6)


def test_in_bf16_only_the_result_is_rounded():
    x = torch.randn(2, 9, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for mine, true in zip(results(rotary, x), results(on_torch, x.double()), strict=True):
        assert ((mine.double() - true).abs() <= 2**-8 * true.abs() + 1e-6).all()  # half of bf16's last bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_are_read_where_they_are_by_any_number_of_threads(dtype):
    whole = torch.randn(2, 9, 7, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    views = (whole[:, :, 2:5], whole.transpose(1, 2)[:, :, 2:5], whole[..., ::2])
    threads = torch.get_num_threads()
    try:
        for view in views:
            torch.set_num_threads(1)
            alone = results(rotary, view.contiguous())
            torch.set_num_threads(3)
            assert all(torch.equal(a, b) for a, b in zip(alone, results(rotary, view), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_angles_made_in_evaluation_can_be_trained_with_later():
    x = torch.randn(1, 11, 1, 6)
    with torch.inference_mode():
        rotary(x, 123.0), on_torch(x, 123.0)
    for function in (rotary, on_torch):
        function(x.requires_grad_(), 123.0).sum().backward()


def test_what_it_cannot_take_is_refused():
    assert refuses(torch.randn(1, 2, 1, 4), 10.0) is None
    assert "float64" in refuses(torch.randn(1, 2, 1, 4).double(), 10.0)
