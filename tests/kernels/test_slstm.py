"""The sLSTM cell against the published recurrence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zexp.kernels.documents import Documents
from zexp.kernels.slstm import reference
from zexp.kernels.slstm.torch_backend import State, slstm, slstm_continue

# B rows · T positions · H heads · P head width
CASES = [(2, 12, 3, 4), (3, 13, 1, 2), (1, 9, 4, 1), (2, 1, 2, 3)]
BOUNDARIES = [
    [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 4, 4],
    [0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 3, 3, 3],
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8],
]
case_of = pytest.mark.parametrize("case", CASES, ids=lambda case: "B{}-T{}-H{}-P{}".format(*case))


def inputs(case: tuple[int, ...], dtype: torch.dtype = torch.float64, spread: float = 1.5) -> list[Tensor]:
    b, t, h, p = case
    generator = torch.Generator().manual_seed(sum(case))
    gates = torch.randn(b, t, h, 4, p, generator=generator, dtype=torch.float64) * spread
    recurrent = torch.randn(h, p, 4, p, generator=generator, dtype=torch.float64) * spread
    return [gates.to(dtype).requires_grad_(), recurrent.to(dtype).requires_grad_()]


def gradients(out: Tensor, made: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((out * weights.to(out.dtype)).sum(), made)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@case_of
def test_outputs_and_gradients_equal_the_recurrence(case, packed):
    made = inputs(case)
    ids = torch.tensor(BOUNDARIES)[: case[0], : case[1]] if packed else None
    ours = slstm(*made, None if ids is None else Documents(ids))
    truth = reference.slstm(*made, documents_BT=ids)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-11)
    for name, mine, true in zip(("gates", "R"), gradients(ours, made), gradients(truth, made), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_gradcheck():
    assert torch.autograd.gradcheck(slstm, inputs((2, 5, 2, 2)))


@pytest.mark.parametrize("parts", [[1] * 13, [13], [5, 1, 1, 6]], ids=str)
def test_it_goes_on_where_it_stopped(parts):
    gates, recurrent = (tensor.detach() for tensor in inputs((3, 13, 2, 4)))
    whole = reference.slstm(gates, recurrent)
    zeros = gates.new_zeros(3, 2, 4)
    state, rows = State(zeros, zeros, torch.full_like(zeros, -torch.inf)), []
    for part in gates.split(parts, dim=1):
        h, state = slstm_continue(part, recurrent, state)
        rows.append(h)
    torch.testing.assert_close(torch.cat(rows, dim=1), whole, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(state.hidden_BHP, whole[:, -1], rtol=1e-10, atol=1e-11)


def test_a_document_receives_nothing_from_the_next():
    gates, recurrent = inputs((2, 12, 3, 4))
    documents = Documents(torch.tensor([0] * 7 + [1] * 5).expand(2, -1))
    (dgates,) = torch.autograd.grad(slstm(gates, recurrent, documents)[:, 7:].sum(), [gates])
    assert not dgates[:, :7].any() and dgates[:, 7:].any()


def test_single_precision_stays_close_to_double():
    case = (2, 150, 2, 8)
    double = inputs(case, spread=0.7)
    single = [tensor.detach().float().requires_grad_() for tensor in double]
    truth, mine = reference.slstm(*double), slstm(*single)
    torch.testing.assert_close(mine.double(), truth, rtol=0, atol=1e-4)
    for ours, true in zip(gradients(mine, single), gradients(truth, double), strict=True):
        assert (ours.double() - true).norm() < 1e-4 * true.norm()


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("spread", [100.0, 1e4])
def test_gates_of_any_size_stay_finite(spread, packed):
    gates, recurrent = inputs((2, 40, 2, 4), torch.float32)
    made = [(gates * spread).detach().requires_grad_(), recurrent]
    ids = torch.arange(40).div(9, rounding_mode="floor").expand(2, -1) if packed else None
    out = slstm(*made, None if ids is None else Documents(ids))
    assert torch.isfinite(out).all() and out.abs().max() <= 1
    assert all(torch.isfinite(gradient).all() for gradient in gradients(out, made))


def test_bf16_inputs_are_run_in_fp32():
    gates, recurrent = (tensor.detach().bfloat16() for tensor in inputs((2, 20, 2, 4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = slstm(gates, recurrent)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), reference.slstm(gates.float(), recurrent.float()), rtol=2**-8, atol=1e-5)
