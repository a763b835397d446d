"""The mLSTM cell in chunks against its recurrence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zexp.kernels.documents import Documents
from zexp.kernels.mlstm import reference
from zexp.kernels.mlstm.torch_backend import State, mlstm, mlstm_continue

# B rows · T positions · H heads · N key width · P value width · Q chunk
CASES = [(2, 12, 3, 3, 5, 4), (1, 13, 2, 4, 2, 4), (2, 7, 3, 2, 2, 16), (1, 9, 1, 2, 3, 1), (2, 1, 2, 2, 2, 4)]
BOUNDARIES = [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 4, 4]
NAMES = ("q", "k", "v", "input", "log forget")
case_of = pytest.mark.parametrize("case", CASES, ids=lambda case: "B{}-T{}-H{}-N{}-P{}-Q{}".format(*case))


def inputs(
    case: tuple[int, ...], dtype: torch.dtype = torch.float64, gates: float = 2.0, shift: float = 0.0
) -> list[Tensor]:
    """gates: how far the input gate's exponents and the forget gates spread; shift: their mean."""
    b, t, h, n, p, _ = case
    generator = torch.Generator().manual_seed(sum(case))
    shapes = [(b, t, h, n), (b, t, h, n), (b, t, h, p), (b, t, h), (b, t, h)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    made[3] = made[3] * gates + shift
    made[4] = F.logsigmoid(made[4] * gates + shift)
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def gradients(out: Tensor, made: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((out * weights.to(out.dtype)).sum(), made)


# With eps = 0 stabilisers cancel; with the published eps they are taken for constants, as in the published kernels.
@pytest.mark.parametrize("eps", [0.0, 1e-6], ids=["no eps", "eps"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("shift", [-3.0, 2.0], ids=["denominator 1", "denominator n q"])
@case_of
def test_outputs_and_gradients_equal_the_recurrence(case, shift, packed, eps):
    made = inputs(case, shift=shift)
    ids = torch.tensor(BOUNDARIES[: case[1]]).expand(case[0], -1) if packed else None
    documents = None if ids is None else Documents(ids)
    ours = mlstm(*made, scale=0.5, eps=eps, chunk=case[5], documents=documents)
    truth = reference.mlstm(*made, scale=0.5, eps=eps, documents_BT=ids, constant_stabiliser=eps > 0)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-11)
    for name, mine, true in zip(NAMES, gradients(ours, made), gradients(truth, made), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_gradcheck():
    made = inputs(CASES[1], shift=1.0)
    assert torch.autograd.gradcheck(lambda *tensors: mlstm(*tensors, scale=0.5, eps=0.0, chunk=4), made)


@pytest.mark.parametrize("parts", [[1] * 13, [13], [5, 1, 1, 6], [4, 8, 1]], ids=str)
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_it_goes_on_where_it_stopped(chunk, parts):
    made = [tensor.detach() for tensor in inputs(CASES[1])]
    whole = reference.mlstm(*made, scale=0.5, eps=1e-6)
    zeros = made[0].new_zeros
    state, rows = State(zeros(1, 2, 4, 2), zeros(1, 2, 4), zeros(1, 2)), []
    for pieces in zip(*(tensor.split(parts, dim=1) for tensor in made), strict=True):
        h, state = mlstm_continue(*pieces, state, scale=0.5, eps=1e-6, chunk=chunk)
        rows.append(h)
    torch.testing.assert_close(torch.cat(rows, dim=1), whole, rtol=1e-10, atol=1e-11)
    b = made[4].flip(1).cumsum(1).flip(1)  # from each position to the end
    logs = made[3] + b - made[4]
    memory = torch.einsum("bth,bthn,bthp->bhnp", logs.exp(), made[1], made[2])
    torch.testing.assert_close(state.memory_BHNP * state.m_BH[..., None, None].exp(), memory, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shift", [-12.0, 0.0, 12.0])
def test_single_precision_stays_close_to_double(shift):
    case = (1, 200, 2, 16, 16, 64)
    double = inputs(case, shift=shift)
    single = [tensor.detach().float().requires_grad_() for tensor in double]
    truth, mine = (
        reference.mlstm(*double, scale=0.25, eps=1e-6),
        mlstm(*single, scale=0.25, eps=1e-6, chunk=64),
    )
    # The denominator may be much smaller than what is summed to it: n q may vanish.
    assert (mine.double() - truth).norm() < 1e-3 * truth.norm()
    wanted = gradients(truth, double)
    for name, ours, true in zip(NAMES, gradients(mine, single), wanted, strict=True):
        # What the forget gates receive is a sum of what the input gates do, of both signs.
        error = (ours.double() - true).norm() / (true.norm() + (1e-3 * wanted[3].norm() if name == "log forget" else 0))
        assert torch.isfinite(ours).all() and error < 1e-2, f"{name}: {error:.1e}"


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("gates", [100.0, 1e4])
def test_gates_of_any_size_stay_finite(gates, packed):
    made = inputs((2, 70, 2, 8, 8, 16), torch.float32, gates=gates)
    ids = torch.arange(70).div(9, rounding_mode="floor").expand(2, -1) if packed else None
    out = mlstm(*made, scale=0.35, eps=1e-6, chunk=16, documents=None if ids is None else Documents(ids))
    assert torch.isfinite(out).all()
    for name, gradient in zip(NAMES, gradients(out, made), strict=True):
        assert torch.isfinite(gradient).all(), name


def test_bf16_inputs_are_mixed_in_fp32():
    made = inputs((2, 64, 2, 8, 8, 16), torch.float32)
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in made[:3]] + made[3:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mlstm(*low, scale=0.35, eps=1e-6, chunk=16)
    high = [tensor.detach().float().requires_grad_() for tensor in low]
    truth = reference.mlstm(*high, scale=0.35, eps=1e-6)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), truth, rtol=2**-7, atol=1e-3)  # one rounding of the output, small n q
    for name, mine, true in zip(NAMES, gradients(out.float(), low), gradients(truth, high), strict=True):
        assert (mine.float() - true).norm() < 0.02 * true.norm(), name
