"""The chunked scan against the recurrence, one position at a time."""

from __future__ import annotations

import pytest
import torch

from zexp.kernels.documents import Documents
from zexp.kernels.ssd import reference
from zexp.kernels.ssd.torch_backend import ssd, ssd_continue

# B rows · T positions · H heads · P head width · G groups · N state size · Q chunk
CASES = [
    (2, 12, 4, 3, 1, 5, 4),
    (1, 13, 4, 2, 2, 3, 4),
    (2, 7, 2, 3, 1, 2, 16),
    (1, 9, 4, 2, 4, 2, 3),
    (2, 5, 2, 2, 1, 2, 1),
]
BOUNDARIES = [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 4, 4]


def inputs(case: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> list[torch.Tensor]:
    b, t, h, p, g, n, _ = case
    generator = torch.Generator().manual_seed(sum(case))
    shapes = [(b, t, h, p), (b, t, h), (h,), (b, t, g, n), (b, t, g, n), (h,)]
    made = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    made[1] = torch.nn.functional.softplus(made[1]) * scale
    made[2] = -made[2].exp()
    return [tensor.requires_grad_() for tensor in made]


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "B{}-T{}-H{}-P{}-G{}-N{}-Q{}".format(*case))
def test_outputs_and_gradients_equal_the_recurrence(case, packed):
    made = inputs(case, torch.float64)
    ids = torch.tensor(BOUNDARIES[: case[1]]).expand(case[0], -1) if packed else None
    ours = ssd(*made, chunk=case[6], documents=None if ids is None else Documents(ids))
    truth = reference.ssd(*made, documents_BT=ids)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)  # fp64: the order of sums is all that differs
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name, mine, true in zip(
        ("x", "dt", "a", "b", "c", "d"),
        torch.autograd.grad((ours * weights).sum(), made),
        torch.autograd.grad((truth * weights).sum(), made),
        strict=True,
    ):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("parts", [[1] * 13, [13], [5, 1, 1, 6], [4, 8, 1]], ids=str)
@pytest.mark.parametrize("case", [CASES[1], (1, 13, 4, 3, 1, 5, 4), (1, 13, 4, 2, 4, 2, 5)])
def test_a_scan_goes_on_where_it_stopped(case, parts):
    x, dt, a, b, c, d = (tensor.detach() for tensor in inputs(case, torch.float64))
    whole = reference.ssd(x, dt, a, b, c, d)
    _, _, heads, width, groups, size, chunk = case
    state, rows = x.new_zeros(1, groups, size, heads * width // groups), []
    for pieces in zip(*(tensor.split(parts, dim=1) for tensor in (x, dt, b, c)), strict=True):
        y, state = ssd_continue(pieces[0], pieces[1], a, pieces[2], pieces[3], d, state, chunk=chunk)
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, dim=1), whole, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    made = inputs(CASES[1], torch.float64)
    assert torch.autograd.gradcheck(lambda *tensors: ssd(*tensors, chunk=4), made)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0], ids=["long memory", "usual", "forgets at once"])
def test_single_precision_gradients_stay_close_to_double(scale):
    case = (1, 256, 2, 16, 1, 16, 64)
    double = inputs(case, torch.float64, scale)
    single = [tensor.detach().float().requires_grad_() for tensor in double]
    weights = torch.randn((1, 256, 2, 16), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    truth = torch.autograd.grad((reference.ssd(*double) * weights).sum(), double)
    mine = torch.autograd.grad((ssd(*single, chunk=64) * weights.float()).sum(), single)
    for name, ours, true in zip(("x", "dt", "a", "b", "c", "d"), mine, truth, strict=True):
        # Reverse sums over a chunk cancel terms of the size of <dy, y>: 64 roundings of fp32, plus those before them.
        error = (ours.double() - true).abs().max() / true.abs().max()
        assert torch.isfinite(ours).all() and error < 1e-4, f"{name}: {error:.1e}"


def test_bf16_inputs_are_scanned_in_fp32():
    made = [tensor.detach() for tensor in inputs((2, 64, 4, 8, 1, 8, 16), torch.float32)]
    low = [made[0].bfloat16(), made[1], made[2], made[3].bfloat16(), made[4].bfloat16(), made[5]]
    out = ssd(*low, chunk=16)
    truth = reference.ssd(*[tensor.float() for tensor in low])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), truth, rtol=2**-8, atol=1e-5)  # one rounding, of the output


def test_autocast_changes_no_dtype_inside_forward_or_backward():
    case = (2, 12, 4, 3, 1, 5, 4)
    plain, under = inputs(case, torch.float32), inputs(case, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = ssd(*under, chunk=4)
    truth = ssd(*plain, chunk=4)
    torch.testing.assert_close(ours, truth, rtol=0, atol=0)
    for mine, true in zip(torch.autograd.grad(ours.sum(), under), torch.autograd.grad(truth.sum(), plain), strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=0)
