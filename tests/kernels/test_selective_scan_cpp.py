"""The scan in C++ against the recurrence in fp64: gates, boundaries, sizes that fill no vector, steps beyond all measure."""

from __future__ import annotations

import pytest
import torch

from zexp.kernels.cpp.compiler import compiler
from zexp.kernels.documents import Documents
from zexp.kernels.selective_scan import reference
from zexp.kernels.selective_scan.cpp_backend import refuses, selective_scan
from zexp.kernels.selective_scan.sizes import SEGMENT

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

# B rows · T positions · I channels · H heads · N state size: a tile is 16 channels, a group 4 rates, a block 256 channels at most
CASES = [
    (2, SEGMENT + 1, 6, 1, 3),
    (1, 2 * SEGMENT, 32, 2, 4),
    (2, 37, 5, 1, 1),
    (2, 1, 4, 4, 2),
    (1, SEGMENT + 9, 3 * 41, 3, 16),
    (1, 19, 530, 1, 6),
]
NAMES = ("y", "x", "dt", "a", "b", "c", "d", "dt_bias", "z")


def inputs(case: tuple[int, ...], *, bias: bool = False, gated: bool = False) -> list[torch.Tensor | None]:
    b, t, i, h, n = case
    generator = torch.Generator().manual_seed(sum(case))
    shapes = [(b, t, i), (b, t, i), (i, n), (b, t, h, n), (b, t, h, n), (i,), (i,), (b, t, i)]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    if not bias:
        made[1] = torch.nn.functional.softplus(made[1])
    made[2] = -made[2].exp()
    return [made[0], made[1], *made[2:6], made[6] if bias else None, made[7] if gated else None]


def packed(batch: int, length: int) -> torch.Tensor:
    """Documents of one position, over a segment's boundary and at it, others in each row."""
    starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(5)) < 0.1
    starts[:, 3:5] = True
    starts[0, SEGMENT : SEGMENT + 1] = True
    return starts.cumsum(1) + 4


def results(function, given, **options) -> list[torch.Tensor]:
    """What it returns, and the gradients, in the order of NAMES."""
    own = [None if tensor is None else tensor.detach().requires_grad_() for tensor in given]
    y = function(*own, **options)
    y = y[0] if isinstance(y, tuple) else y
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [tensor for tensor in own if tensor is not None], weights)]


def assert_close(given, ours, tolerance, ids=None) -> None:
    """To the recurrence in fp64, by norms."""
    double = [None if tensor is None else tensor.double() for tensor in given]
    names = ["y", *(name for name, tensor in zip(NAMES[1:], given, strict=True) if tensor is not None)]
    for name, mine, true in zip(names, ours, results(reference.selective_scan, double, documents_BT=ids), strict=True):
        error = float((mine.double() - true).norm() / true.norm().clamp_min(1e-30))
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("with_documents", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize(("bias", "gated"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "B{}-T{}-I{}-H{}-N{}".format(*case))
def test_outputs_and_gradients_equal_the_recurrence(case, bias, gated, with_documents):
    given = inputs(case, bias=bias, gated=gated)
    ids = packed(case[0], case[1]) if with_documents else None
    ours = results(selective_scan, given, documents=None if ids is None else Documents(ids))
    assert_close(given, ours, 2e-6, ids)  # fp32: sums in another order


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-4, 1e-2, 10.0, 1e4, 1e30])
def test_steps_of_any_size_are_followed(scale):
    given = inputs((2, 150, 20, 1, 16))
    given[1] *= scale
    given[0] /= max(scale, 1.0)  # else what is written is beyond fp32
    ours = results(selective_scan, given)
    assert all(tensor.isfinite().all() for tensor in ours)
    assert_close(given, ours, 1e-5)


def test_a_step_beyond_all_measure_forgets_what_was_before():
    given = inputs((1, 80, 16, 1, 4), bias=True, gated=True)
    given[1][:, 40] = 1e36
    given[0][:, 40] = 0.0
    given[7][:, 41] = -3e38
    assert all(tensor.isfinite().all() for tensor in results(selective_scan, given))
    after = [tensor[:, 41:] if tensor.shape[:2] == (1, 80) else tensor for tensor in given]
    whole, alone = selective_scan(*given)[:, 41:], selective_scan(*after)
    torch.testing.assert_close(whole, alone)


def test_rates_that_underflow_still_forget_the_document_before():
    given = inputs((1, 80, 8, 1, 4))
    given[2] *= 1e-38
    ids = torch.arange(80)[None] // 30
    assert_close(given, results(selective_scan, given, documents=Documents(ids)), 1e-5, ids)


def test_views_are_read_where_they_are():
    x, dt, a, b, c, d, bias, z = inputs((2, 70, 24, 2, 5), bias=True, gated=True)
    low = torch.cat((torch.zeros(2, 70, 2, 3), b, c), dim=-1)
    xz = torch.cat((x, z), dim=-1)
    views = [xz[..., :24], dt, a, low[..., 3:8], low[..., 8:], d, bias, xz[..., 24:]]
    for mine, true in zip(results(selective_scan, views), results(selective_scan, (x, dt, a, b, c, d, bias, z)), strict=True):
        assert torch.equal(mine, true)


def test_bits_do_not_depend_on_the_number_of_threads():
    threads, given, made = torch.get_num_threads(), inputs((2, 70, 530, 1, 16), bias=True, gated=True), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            made.append(results(selective_scan, given))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for others in made[1:] for one, other in zip(made[0], others, strict=True))


@pytest.mark.parametrize("step", [torch.float32, torch.bfloat16], ids=["steps in fp32", "steps in bf16"])
def test_bf16_is_read_and_written_and_computed_in_fp32(step):
    given = inputs((2, 150, 24, 1, 16), bias=True, gated=True)
    low = [given[0].bfloat16(), given[1].to(step), given[2], given[3].bfloat16(), given[4].bfloat16(), *given[5:7], given[7].bfloat16()]
    assert refuses(*low) is None
    ours = results(selective_scan, low)
    assert [tensor.dtype for tensor in ours[1:]] == [tensor.dtype for tensor in low] and ours[0].dtype == torch.bfloat16
    for name, mine, true in zip(NAMES, ours, results(selective_scan, [tensor.float() for tensor in low]), strict=True):
        # One rounding, of what comes out; the gradients get weights that were rounded once too.
        assert (mine.float() - true).norm() < 4e-3 * true.norm(), name


def test_what_it_keeps_is_its_inputs_and_the_state_at_every_segment():
    given = [tensor.requires_grad_() for tensor in inputs((2, SEGMENT + 3, 20, 1, 6), bias=True, gated=True)]
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.setdefault(one.data_ptr(), one), lambda one: one):
        selective_scan(*given)
    own = [tensor for address, tensor in kept.items() if address not in {one.data_ptr() for one in given}]
    assert [tuple(tensor.shape) for tensor in own] == [(2, 2, 6, 20)]


def test_other_numbers_are_left_to_torch():
    given = inputs((1, 5, 8, 1, 4))
    assert "float64" in refuses(*(None if tensor is None else tensor.double() for tensor in given))
    assert "weights in bfloat16" in refuses(given[0], given[1].bfloat16(), *given[2:])
    assert "bfloat16 and float32" in refuses(given[0].bfloat16(), *given[1:])
