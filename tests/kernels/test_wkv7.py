"""RWKV-7's operations against their slow references; the state's update in chunks against one position at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.test_torch_backends import IDS, assert_same, drawn
from zexp.kernels.documents import Documents
from zexp.kernels.rwkv7_keys import reference as keys_reference
from zexp.kernels.rwkv7_keys.torch_backend import rwkv7_keys
from zexp.kernels.rwkv7_out import reference as out_reference
from zexp.kernels.rwkv7_out.torch_backend import rwkv7_out
from zexp.kernels.token_shift import reference as shift_reference
from zexp.kernels.token_shift.torch_backend import token_shift, token_shift_continue
from zexp.kernels.wkv7 import reference
from zexp.kernels.wkv7.chunk import CHUNK
from zexp.kernels.wkv7.torch_backend import FASTEST, log_decay, wkv7, wkv7_continue

NAMES = ("r", "w", "k", "v", "kappa", "a")
# B rows · T positions · H heads · N key width · P value width
CASES = [(2, 2 * CHUNK, 2, 4, 4), (1, 2 * CHUNK + 7, 3, 3, 5), (2, CHUNK - 1, 2, 2, 3), (1, 1, 2, 3, 3)]


def inputs(case: tuple[int, ...], dtype: torch.dtype = torch.float64, decay: Tensor | None = None) -> list[Tensor]:
    """decay: instead of log-decays drawn over their whole range."""
    b, t, h, n, p = case
    generator = torch.Generator().manual_seed(sum(case))
    r, w, k, kappa, a = (torch.randn(b, t, h, n, generator=generator, dtype=dtype) for _ in range(5))
    v = torch.randn(b, t, h, p, generator=generator, dtype=dtype)
    w = -FASTEST * (4 * w).sigmoid() if decay is None else decay.to(dtype).expand_as(w).clone()
    return [tensor.requires_grad_() for tensor in (r, w, k, v, F.normalize(kappa, dim=-1), a.sigmoid())]


def boundaries(batch: int, length: int) -> Tensor:
    """Many documents in the first row, of one position some; one boundary at a chunk's edge in the others."""
    generator = torch.Generator().manual_seed(length)
    ids = (torch.rand(batch, length, generator=generator) < 0.15).long().cumsum(1)
    ids[1:] = (torch.arange(length) >= CHUNK).long()
    return ids


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "B{}-T{}-H{}-N{}-P{}".format(*case))
def test_outputs_and_gradients_equal_the_recurrence(case, packed):
    ids = boundaries(*case[:2]) if packed else None
    assert_same(
        lambda *tensors: wkv7(*tensors, documents=None if ids is None else Documents(ids)),
        lambda *tensors: reference.wkv7(*tensors, documents_BT=ids),
        inputs(case),
    )


def test_chunks_in_several_parts(monkeypatch):
    case = (1, 5 * CHUNK, 1, 2, 2)
    monkeypatch.setattr("zexp.kernels.wkv7.torch_backend.PART_ELEMENTS", 2 * CHUNK * 2)  # of two chunks, then one
    ids = boundaries(*case[:2])
    assert_same(
        lambda *tensors: wkv7(*tensors, documents=Documents(ids)),
        lambda *tensors: reference.wkv7(*tensors, documents_BT=ids),
        inputs(case),
    )


@pytest.mark.parametrize("parts", [[1] * 9, [9], [40], [3, 1, 1, CHUNK, CHUNK + 5, 1]], ids=str)
def test_a_scan_goes_on_where_it_stopped(parts):
    case = (2, sum(parts), 2, 3, 5)
    whole = reference.wkv7(*inputs(case)).detach()
    state, rows = whole.new_zeros(2, 2, 3, 5), []
    for pieces in zip(*(tensor.detach().split(parts, dim=1) for tensor in inputs(case)), strict=True):
        y, state = wkv7_continue(*pieces, state)
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, dim=1), whole, rtol=1e-10, atol=1e-12)
    last = torch.eye(3, dtype=torch.float64).expand(2, 2, 3, 3)  # reading with unit vectors shows the state
    shown = torch.stack([_read(inputs(case), last[..., n]) for n in range(3)], dim=2)
    torch.testing.assert_close(state, shown, rtol=1e-10, atol=1e-12)


def _read(made: list[Tensor], r_BHN: Tensor) -> Tensor:
    """The last output, (B, H, P), if the last position reads with r."""
    r = made[0].detach().clone()
    r[:, -1] = r_BHN
    return reference.wkv7(r, *(tensor.detach() for tensor in made[1:]))[:, -1]


@pytest.mark.parametrize(
    "decay",
    [torch.tensor(0.0), torch.tensor(-FASTEST), torch.tensor([0.0, -FASTEST] * 8), None],
    ids=["keeps all", "forgets fastest", "channel by channel", "drawn"],
)
def test_single_precision_stays_close_to_double(decay):
    case = (1, 4 * CHUNK, 2, 16, 16)
    double = inputs(case, decay=decay)
    single = [tensor.detach().float().requires_grad_() for tensor in double]
    weights = torch.randn(1, 4 * CHUNK, 2, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    true, mine = reference.wkv7(*double), wkv7(*single)
    torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-5 * true.abs().max().item())
    truth = torch.autograd.grad((true * weights).sum(), double)
    for name, ours, wanted in zip(
        NAMES, torch.autograd.grad((mine * weights.float()).sum(), single), truth, strict=True
    ):
        # The sums over a chunk that make w's gradient cancel terms as large as the largest of <r, dr>.
        error = (ours.double() - wanted).abs().max() / wanted.abs().max()
        assert torch.isfinite(ours).all() and error < 1e-4, f"{name}: {error:.1e}"


def test_the_decay_of_a_chunk_stays_far_from_the_end_of_single_precision():
    """The bound that the module's docstring argues, with values that no trained model reaches."""
    case = (1, 2 * CHUNK, 1, 64, 64)
    made = [1e3 * tensor.detach().float() for tensor in inputs(case)]
    made[1] = torch.full_like(made[1], -FASTEST)
    made[4:] = [torch.ones_like(tensor) / 8 for tensor in made[4:]]
    made = [tensor.requires_grad_() for tensor in made]
    out = wkv7(*made)
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(out.sum(), made))


def test_low_precision_is_scanned_in_fp32_also_under_autocast():
    made = [tensor.detach() for tensor in inputs((2, 64, 2, 8, 8), torch.float32)]
    made = [tensor.bfloat16() for tensor in made]
    truth = reference.wkv7(*(tensor.float() for tensor in made))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = wkv7(*made)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), truth, rtol=2**-8, atol=1e-5)  # one rounding, of the output


def test_log_decay():
    assert_same(log_decay, reference.log_decay, drawn((2, 3, 4)))
    assert log_decay(torch.tensor([-1e3, 1e3])).tolist() == [0.0, pytest.approx(-FASTEST)]


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("mixes", [1, 3])
def test_token_shift(mixes, packed):
    ids = IDS if packed else None
    assert_same(
        lambda x, mix: torch.stack(token_shift(x, mix, None if ids is None else Documents(ids))),
        lambda x, mix: torch.stack(shift_reference.token_shift(x, mix, ids)),
        drawn((2, 9, 3), (mixes, 3)),
    )


def test_token_shift_goes_on_where_it_stopped():
    x, mix = (tensor.detach() for tensor in drawn((2, 9, 3), (2, 3)))
    whole = torch.stack(token_shift(x, mix))
    last, parts = x.new_zeros(2, 3), []
    for part in x.split([4, 1, 1, 3], dim=1):
        shifted, last = token_shift_continue(part, mix, last)
        parts.append(torch.stack(shifted))
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(last, x[:, -1])


def test_keys():
    assert_same(
        lambda *tensors: torch.stack(rwkv7_keys(*tensors)),
        lambda *tensors: torch.stack(keys_reference.rwkv7_keys(*tensors)),
        drawn((2, 3, 4, 5), (2, 3, 4, 5), (4, 5), (4, 5)),
    )


def test_a_zero_key_removes_nothing():
    k = torch.zeros(1, 1, 2, 3, requires_grad=True)
    written, removal = rwkv7_keys(k, torch.ones(1, 1, 2, 3), torch.ones(2, 3), torch.ones(2, 3))
    (written.sum() + removal.square().sum()).backward()
    assert not written.any() and not removal.any()
    assert k.grad is not None and torch.isfinite(k.grad).all()


def test_out():
    heads = (4, 5)
    assert_same(
        lambda *tensors: rwkv7_out(*tensors, 1e-3),
        lambda *tensors: out_reference.rwkv7_out(*tensors, 1e-3),
        drawn(*[(2, 3, *heads)] * 5, *[heads] * 3),
    )
