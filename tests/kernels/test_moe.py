"""Experts over sorted tokens against every expert over every token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zexp.kernels.activation.names import GATED, PLAIN
from zexp.kernels.cpp.compiler import compiler
from zexp.kernels.moe import cpp_backend, reference
from zexp.kernels.moe.torch_backend import load, moe

TOKENS, WIDTH, EXPERTS, INNER = 23, 6, 5, 7


def inputs(top_k: int, activation: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, weights, up, down; the last expert gets no token where that is possible."""
    generator = torch.Generator().manual_seed(top_k)
    rows = INNER * (2 if activation in GATED else 1)
    shapes = [(TOKENS, WIDTH), (top_k, TOKENS), (EXPERTS, rows, WIDTH), (EXPERTS, WIDTH, INNER)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def choices(top_k: int) -> Tensor:
    scores = torch.randn(EXPERTS, TOKENS, generator=torch.Generator().manual_seed(9))
    scores[-1] -= 100
    return scores.topk(top_k, dim=0).indices


@pytest.mark.parametrize("activation", [*GATED, *PLAIN])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_moe(top_k, activation):
    chosen = choices(top_k)
    x, weights, up, down = inputs(top_k, activation)
    ours = moe(x, chosen, weights, up, down, activation)
    true = reference.moe(x, chosen, weights, up, down, activation)
    torch.testing.assert_close(ours, true, rtol=1e-11, atol=1e-11)
    dout = torch.randn(true.shape, generator=torch.Generator().manual_seed(7), dtype=true.dtype)
    left, right = (torch.autograd.grad((y * dout).sum(), (x, weights, up, down)) for y in (ours, true))
    for mine, theirs in zip(left, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    if top_k < EXPERTS:
        assert not left[2][-1].any() and not left[3][-1].any(), "nobody chose the last expert"


def test_loads_count_choices():
    assert load(choices(2), EXPERTS).tolist()[-1] == 0
    assert load(choices(2), EXPERTS).sum() == 2 * TOKENS
    assert load(choices(EXPERTS), EXPERTS).tolist() == [TOKENS] * EXPERTS


def test_a_weight_of_zero_has_a_gradient():
    x, weights, up, down = inputs(2, "swiglu")
    with torch.no_grad():
        weights.zero_()
    found = torch.autograd.grad(moe(x, choices(2), weights, up, down, "swiglu").sum(), (x, weights))
    true = torch.autograd.grad(reference.moe(x, choices(2), weights, up, down, "swiglu").sum(), (x, weights))
    assert not found[0].any() and found[1].all()
    torch.testing.assert_close(found[1], true[1])


def test_autocast_multiplies_in_bf16_and_adds_in_fp32():
    x, weights, up, down = inputs(2, "swiglu", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = moe(x, choices(2), weights, up, down, "swiglu")
    high = moe(x, choices(2), weights, up, down, "swiglu")
    assert low.dtype == torch.float32
    for mine, true in zip(
        [low, *torch.autograd.grad(low.square().sum(), (x, weights, up, down))],
        [high, *torch.autograd.grad(high.square().sum(), (x, weights, up, down))],
        strict=True,
    ):
        assert mine.dtype == torch.float32
        assert (mine - true).norm() < 0.02 * true.norm()  # bf16 keeps 8 bits: 0.4 % a factor


def test_large_values_stay_finite():
    x, weights, up, down = inputs(2, "swiglu", torch.float32)
    y = moe(x * 1e6, choices(2), weights, up, down, "swiglu")
    assert all(tensor.isfinite().all() for tensor in [y, *torch.autograd.grad(y.sum(), (x, weights, up, down))])


def test_only_the_experts_inner_values_are_kept():
    x, weights, up, down = inputs(2, "swiglu", torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        moe(x, choices(2), weights, up, down, "swiglu")
    sizes = sorted(tensor.numel() for tensor in kept if tensor.data_ptr() not in {t.data_ptr() for t in (x, weights, up, down)})
    assert sizes == [2 * TOKENS, 2 * TOKENS * 2 * INNER], "the order of the choices, gate and up of each"


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_choices_the_kernels_in_cpp_keep_where_they_went_and_in_fp32_their_inner_values(dtype):
    x, weights, up, down = inputs(2, "swiglu", torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        cpp_backend.moe(x, choices(2), weights, up, down, "swiglu")
    others = [tensor for tensor in kept if tensor.data_ptr() not in {t.data_ptr() for t in (x, weights, up, down)}]
    token_N, places_KM, *inner = others
    assert (token_N.dtype, places_KM.dtype, places_KM.shape) == (torch.int64, torch.int64, (2, TOKENS))
    assert [tensor.shape for tensor in inner] == ([(len(token_N), 2 * INNER)] if dtype == torch.float32 else [])


def test_numbers_of_rows_are_few_and_little_above_the_counts():
    counts = torch.arange(5000)
    filled = cpp_backend._filled(counts)
    assert (filled >= counts).all() and (filled - counts < torch.clamp(counts / 4, min=8)).all()
    assert not (filled % 8).any() and filled[0] == 0
    above = filled[counts > 32].unique()
    assert len(above) <= 4 * 8, "four from each power of two to the next"
