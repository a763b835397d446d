"""The gated delta rule in chunks against the recurrence, one position at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zexp.kernels.documents import Documents
from zexp.kernels.gated_delta import reference
from zexp.kernels.gated_delta.torch_backend import gated_delta, gated_delta_continue

# B rows · T positions · G key heads · J value heads of a key head · N key width · P value width · Q chunk
CASES = [
    (2, 12, 2, 2, 3, 5, 4),
    (1, 13, 1, 3, 4, 2, 4),
    (2, 7, 3, 1, 2, 2, 16),
    (1, 70, 2, 1, 4, 3, 32),
    (1, 130, 1, 2, 3, 4, 64),
    (1, 97, 1, 1, 3, 3, 48),
    (1, 9, 1, 2, 2, 3, 1),
    (2, 1, 2, 1, 2, 2, 4),
]
case_of = pytest.mark.parametrize("case", CASES, ids=lambda case: "B{}-T{}-G{}-J{}-N{}-P{}-Q{}".format(*case))
NAMES = ("q", "k", "v", "g", "beta")


def inputs(case: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, log-decays of up to a nat a position, and beta from 0 to 2."""
    b, t, groups, shared, n, p, _ = case
    generator = torch.Generator().manual_seed(sum(case))
    shapes = [(b, t, groups, n), (b, t, groups, n), (b, t, groups * shared, p)]
    made = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    g, beta = (torch.rand((b, t, groups * shared), generator=generator, dtype=dtype) for _ in range(2))
    return [tensor.requires_grad_() for tensor in (*made, -g, 2 * beta)]


def boundaries(case: tuple[int, ...]) -> Tensor:
    """Documents of a few positions each, some of one, others longer than a chunk."""
    starts = torch.rand(case[:2], generator=torch.Generator().manual_seed(7)) < 0.2
    starts[:, 40:100] = False
    return starts.long().cumsum(1)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@case_of
def test_outputs_and_gradients_equal_the_recurrence(case, packed):
    made, ids = inputs(case), boundaries(case) if packed else None
    ours = gated_delta(*made, chunk=case[-1], documents=None if ids is None else Documents(ids))
    truth, _ = reference.gated_delta(*made, ids)
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = zip(
        NAMES,
        torch.autograd.grad((ours * weights).sum(), made),
        torch.autograd.grad((truth * weights).sum(), made),
        strict=True,
    )
    for name, mine, true in gradients:
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda *made: gated_delta(*made, chunk=4), inputs(CASES[1]))


@pytest.mark.parametrize("parts", [[1] * 13, [13], [5, 1, 1, 6], [4, 8, 1]], ids=str)
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_it_goes_on_where_it_stopped(chunk, parts):
    case = (2, 13, 2, 3, 4, 5, chunk)
    made = [tensor.detach() for tensor in inputs(case)]
    whole, last = reference.gated_delta(*made)
    state, rows = torch.zeros(2, 2, 4, 15, dtype=torch.float64), []
    for pieces in zip(*(tensor.split(parts, dim=1) for tensor in made), strict=True):
        before = state.clone()
        y, after = gated_delta_continue(*pieces, state, chunk=chunk)
        assert torch.equal(state, before)  # it may be kept, to go back to
        state = after
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, dim=1), whole, rtol=1e-11, atol=1e-12)
    by_head = state.unflatten(-1, (3, 5)).permute(0, 1, 3, 2, 4).flatten(1, 2)  # (B, H, N, P)
    torch.testing.assert_close(by_head, last, rtol=1e-11, atol=1e-12)


def test_nothing_of_another_document_is_in_a_gradient():
    case = (1, 64, 1, 1, 4, 4, 64)
    made, ids = inputs(case), (torch.arange(64) >= 23).long()[None]
    y = gated_delta(*made, chunk=64, documents=Documents(ids))
    for tensor in torch.autograd.grad(y[:, 23:].square().sum(), made):
        assert not tensor[:, :23].any() and tensor[:, 23:].any()


HARD = {
    "usual": lambda g, beta: (g, beta),
    "never forgets": lambda g, beta: (g * 0, beta),
    "forgets at once": lambda g, beta: (g * 1000, beta),
    "writes nothing": lambda g, beta: (g, beta * 0),
    "turns its sign": lambda g, beta: (g * 0, torch.full_like(beta, 2.0)),
}
# Summed log-decays of a chunk reach -64000, where fp32 resolves 0.004. A state that is turned 300 times and forgets
# nothing keeps every rounding (the recurrence in fp32 is 1e-5 off).
BOUNDS = {"forgets at once": 1e-3, "turns its sign": 1e-4}


@pytest.mark.parametrize("repeated", [False, True], ids=["other keys", "one key"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("kind", HARD)
def test_single_precision_stays_close_to_double(kind, packed, repeated):
    case = (1, 300, 2, 1, 16, 16, 64)
    ids = boundaries(case) if packed else None
    q, k, v, g, beta = (tensor.detach() for tensor in inputs(case))
    k = k[:, :1].expand_as(k) if repeated else k
    single = [tensor.float().requires_grad_() for tensor in (q, k, v, *HARD[kind](g, beta))]
    double = [tensor.detach().double().requires_grad_() for tensor in single]
    weights = torch.randn(v.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    truth, _ = reference.gated_delta(*double, ids)
    mine = gated_delta(*single, chunk=64, documents=None if ids is None else Documents(ids))
    bound = BOUNDS.get(kind, 1e-5)
    assert (mine.double() - truth).abs().max() <= bound * truth.abs().max()
    gradients = zip(
        torch.autograd.grad((mine * weights.float()).sum(), single),
        torch.autograd.grad((truth * weights).sum(), double),
        strict=True,
    )
    for ours, true in gradients:
        assert torch.isfinite(ours).all() and (ours.double() - true).abs().max() <= 10 * bound * true.abs().max()


def test_keys_of_zeros_have_finite_gradients():
    made = [tensor.detach().float() for tensor in inputs((1, 20, 1, 1, 4, 4, 8))]
    made = [torch.zeros_like(made[0]), torch.zeros_like(made[1]), *made[2:]]
    y = gated_delta(*(tensor.requires_grad_() for tensor in made), chunk=8)
    assert all(torch.isfinite(tensor).all() for tensor in torch.autograd.grad(y.sum(), made))


def test_bf16_inputs_are_mixed_in_fp32():
    low = [tensor.detach().bfloat16() for tensor in inputs((2, 64, 2, 1, 8, 8, 16))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gated_delta(*low, chunk=16)
    truth, _ = reference.gated_delta(*(tensor.float() for tensor in low))
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(gated_delta(*(x.requires_grad_() for x in low), chunk=16).sum(), low)
    assert all(tensor.dtype == torch.bfloat16 for tensor in gradients)
    torch.testing.assert_close(out.float(), truth, rtol=2**-8, atol=1e-5)  # one rounding, of the output
