"""The scan in pieces against the recurrence, one position at a time."""

from __future__ import annotations

import pytest
import torch

from zexp.kernels.documents import Documents
from zexp.kernels.selective_scan import reference, torch_backend
from zexp.kernels.selective_scan.torch_backend import selective_scan, selective_scan_continue

# B rows · T positions · I channels · H heads · N state size
CASES = [(2, 33, 6, 1, 3), (3, 16, 4, 2, 5), (1, 37, 5, 1, 1), (2, 1, 4, 4, 2)]
BOUNDARIES = [0, 0, 0, 1, 1] + [2] * 11 + [3] * 2 + [4] * 14 + [5] + [6] * 4
NAMES = ("x", "dt", "a", "b", "c", "d")


def inputs(case: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> list[torch.Tensor]:
    b, t, i, h, n = case
    generator = torch.Generator().manual_seed(sum(case))
    shapes = [(b, t, i), (b, t, i), (i, n), (b, t, h, n), (b, t, h, n), (i,)]
    made = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    made[1] = torch.nn.functional.softplus(made[1]) * scale
    made[2] = -made[2].exp()
    return [tensor.requires_grad_() for tensor in made]


@pytest.fixture(params=[1 << 15, 12, 4], ids=["whole", "cut into rows", "cut into channels"])
def pieces(request, monkeypatch):
    monkeypatch.setattr(torch_backend, "STEP_ELEMENTS", request.param)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "B{}-T{}-I{}-H{}-N{}".format(*case))
def test_outputs_and_gradients_equal_the_recurrence(case, packed):
    made = inputs(case, torch.float64)
    ids = torch.tensor(BOUNDARIES[: case[1]]).expand(case[0], -1) if packed else None
    ours = selective_scan(*made, documents=None if ids is None else Documents(ids))
    truth, _ = reference.selective_scan(*made, documents_BT=ids)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)  # fp64: the order of sums is all that differs
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name, mine, true in zip(
        NAMES,
        torch.autograd.grad((ours * weights).sum(), made),
        torch.autograd.grad((truth * weights).sum(), made),
        strict=True,
    ):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("parts", [[1] * 33, [33], [5, 1, 1, 26], [16, 16, 1]], ids=str)
@pytest.mark.parametrize("case", [CASES[0], (2, 33, 4, 2, 3)])
def test_a_scan_goes_on_where_it_stopped(case, parts):
    x, dt, a, b, c, d = (tensor.detach() for tensor in inputs(case, torch.float64))
    whole, last_BIN = reference.selective_scan(x, dt, a, b, c, d)
    batch, _, inner, heads, size = case
    state, rows = x.new_zeros(batch, heads, size, inner // heads), []
    for piece in zip(*(tensor.split(parts, dim=1) for tensor in (x, dt, b, c)), strict=True):
        y, state = selective_scan_continue(piece[0], piece[1], a, piece[2], piece[3], d, state)
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, dim=1), whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state.transpose(2, 3).flatten(1, 2), last_BIN, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    assert torch.autograd.gradcheck(selective_scan, inputs((1, 19, 4, 2, 2), torch.float64))


@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0, 1e4], ids=["long memory", "usual", "forgets at once", "only zeros"])
def test_single_precision_stays_close_to_double(scale):
    double = inputs((2, 200, 8, 1, 16), torch.float64, scale)
    single = [tensor.detach().float().requires_grad_() for tensor in double]
    weights = torch.randn((2, 200, 8), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    truth, _ = reference.selective_scan(*double)
    mine = selective_scan(*single)
    pairs = zip(
        ("y", *NAMES),
        (mine, *torch.autograd.grad((mine * weights.float()).sum(), single)),
        (truth, *torch.autograd.grad((truth * weights).sum(), double)),
        strict=True,
    )
    for name, ours, true in pairs:
        error = (ours.double() - true).abs().max() / true.abs().max().clamp_min(1e-30)
        assert torch.isfinite(ours).all() and error < 2e-5, f"{name}: {error:.1e}"


def test_rates_that_underflow_still_forget_the_document_before():
    x, dt, a, b, c, d = (tensor.detach().requires_grad_() for tensor in inputs((1, 6, 2, 1, 2), torch.float32))
    ids = torch.tensor([[0, 0, 0, 1, 1, 1]])
    rates = (a * 1e-30).detach().requires_grad_()
    packed = selective_scan(x, dt, rates, b, c, d, documents=Documents(ids))
    alone = selective_scan(x[:, 3:], dt[:, 3:], rates, b[:, 3:], c[:, 3:], d)
    torch.testing.assert_close(packed[:, 3:], alone)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(packed.sum(), (x, dt, rates, b, c, d)))


def test_bf16_inputs_are_scanned_in_fp32():
    made = [tensor.detach() for tensor in inputs((2, 40, 8, 1, 4), torch.float32)]
    low = [made[0].bfloat16(), made[1], made[2], made[3].bfloat16(), made[4].bfloat16(), made[5]]
    truth, _ = reference.selective_scan(*[tensor.float() for tensor in low])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = selective_scan(*low)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), truth, rtol=2**-8, atol=1e-5)  # one rounding, of the output
