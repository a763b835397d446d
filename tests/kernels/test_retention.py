"""Retention in chunks against its recurrent and its parallel form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zexp.kernels.documents import Documents
from zexp.kernels.retention import reference
from zexp.kernels.retention.torch_backend import retention, retention_continue

# B rows · T positions · H heads · N key width · P value width · Q chunk
CASES = [(2, 12, 4, 3, 5, 4), (1, 13, 2, 4, 2, 4), (2, 7, 3, 2, 2, 16), (1, 9, 1, 2, 3, 1), (2, 1, 2, 2, 2, 4)]
BOUNDARIES = [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 4, 4]
SCALE = 0.3
case_of = pytest.mark.parametrize("case", CASES, ids=lambda case: "B{}-T{}-H{}-N{}-P{}-Q{}".format(*case))


def inputs(case: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    b, t, h, n, p, _ = case
    generator = torch.Generator().manual_seed(sum(case))
    shapes = [(b, t, h, n), (b, t, h, n), (b, t, h, p)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def decays(heads: int, first: float = 1.0) -> tuple[float, ...]:
    return tuple(math.log1p(-(2.0 ** -(first + head))) for head in range(heads))


@pytest.mark.parametrize("form", [reference.retention, reference.retention_parallel], ids=["recurrent", "parallel"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@case_of
def test_outputs_and_gradients_equal_the_other_forms(case, packed, form):
    made, log_decays = inputs(case), decays(case[2])
    ids = torch.tensor(BOUNDARIES[: case[1]]).expand(case[0], -1) if packed else None
    documents = None if ids is None else Documents(ids)
    ours = retention(*made, log_decays, scale=SCALE, chunk=case[5], documents=documents)
    truth = form(*made, log_decays, scale=SCALE, documents_BT=ids)
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name, mine, true in zip(
        "qkv",
        torch.autograd.grad((ours * weights).sum(), made),
        torch.autograd.grad((truth * weights).sum(), made),
        strict=True,
    ):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_gradcheck():
    made = inputs(CASES[1])
    assert torch.autograd.gradcheck(lambda *qkv: retention(*qkv, decays(2), scale=SCALE, chunk=4), made)


@pytest.mark.parametrize("parts", [[1] * 13, [13], [5, 1, 1, 6], [4, 8, 1]], ids=str)
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_it_goes_on_where_it_stopped(chunk, parts):
    q, k, v = (tensor.detach() for tensor in inputs(CASES[1]))
    whole = reference.retention(q, k, v, decays(2), scale=SCALE)
    state, rows = q.new_zeros(1, 2, 4, 2), []
    for pieces in zip(*(tensor.split(parts, dim=1) for tensor in (q, k, v)), strict=True):
        y, state = retention_continue(*pieces, decays(2), state, scale=SCALE, chunk=chunk)
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, dim=1), whole, rtol=1e-11, atol=1e-12)
    powers_HT = (torch.tensor(decays(2), dtype=torch.float64)[:, None] * torch.arange(12, -1, -1)).exp()
    torch.testing.assert_close(state, torch.einsum("ht,bthn,bthp->bhnp", powers_HT, k, v), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("first", [1e-3, 5.0, 40.0], ids=["forgets at once", "usual", "never forgets"])
def test_single_precision_stays_close_to_double(first):
    case = (1, 300, 2, 16, 16, 64)
    double = inputs(case)
    single = [tensor.detach().float().requires_grad_() for tensor in double]
    weights = torch.randn((1, 300, 2, 16), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    truth = reference.retention(*double, decays(2, first), scale=0.25)
    mine = retention(*single, decays(2, first), scale=0.25, chunk=64)
    torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-5 * truth.abs().max().item())
    for ours, true in zip(
        torch.autograd.grad((mine * weights.float()).sum(), single),
        torch.autograd.grad((truth * weights).sum(), double),
        strict=True,
    ):
        assert torch.isfinite(ours).all() and (ours.double() - true).abs().max() < 1e-5 * true.abs().max()


def test_bf16_inputs_are_mixed_in_fp32():
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs((2, 64, 2, 8, 8, 16))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = retention(*low, decays(2), scale=0.25, chunk=16)
    high = [tensor.detach().float().requires_grad_() for tensor in low]
    truth = reference.retention(*high, decays(2), scale=0.25)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), truth, rtol=2**-8, atol=1e-5)  # one rounding, of the output
    for mine, true in zip(torch.autograd.grad(out.sum(), low), torch.autograd.grad(truth.sum(), high), strict=True):
        torch.testing.assert_close(mine.float(), true, rtol=2**-8, atol=1e-4)
