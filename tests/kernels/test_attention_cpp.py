"""Attention in C++ against the whole score matrix in fp64, wherever a tile begins or ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zexp.kernels.attention import cpp_backend
from zexp.kernels.attention.cpp_backend import attention, refuses
from zexp.kernels.attention.reference import attention as reference
from zexp.kernels.cpp.compiler import compiler
from zexp.kernels.documents import Documents

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

BATCH, HEADS, GROUPS, WIDTH, VALUES = 3, 6, 2, 8, 5


def inputs(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(length)
    shapes = ((HEADS, WIDTH), (GROUPS, WIDTH), (GROUPS, VALUES))
    return [torch.randn(BATCH, length, *shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]


def documents(length: int) -> Documents:
    """Of one position and more, others in each row, with ids that do not count."""
    starts = torch.rand(BATCH, length, generator=torch.Generator().manual_seed(1)) < 0.05
    starts[:, length // 2 : length // 2 + 2] = True
    return Documents(7 - 3 * starts.cumsum(1))


def results(function, given, **options) -> list[Tensor]:
    """What it returns, and the gradients of q, k and v."""
    own = [tensor.detach().requires_grad_() for tensor in given]
    out = function(*own, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, own, weights)]


def assert_close(ours: list[Tensor], given: list[Tensor], tolerance: float, packed: Documents | None = None, **options) -> None:
    """To the whole matrix in fp64, by the largest number of each."""
    true = results(reference, [x.detach().double() for x in given], documents_BT=None if packed is None else packed.ids_BT, **options)
    for name, mine, other in zip(("out", "dq", "dk", "dv"), ours, true, strict=True):
        error, largest = float((mine.double() - other).abs().max()), float(other.abs().max())
        assert error <= tolerance * largest, f"{name}: {error:.1e} of {largest:.1e}"


@pytest.mark.parametrize("together", [1, 1 << 21], ids=["one pair a tile", "all pairs"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("window", [None, 1, 7, 128, 150])
@pytest.mark.parametrize("length", [2, 127, 128, 129, 300])
def test_values_and_gradients_are_those_of_the_whole_matrix(monkeypatch, length, window, packed, together):
    monkeypatch.setattr(cpp_backend, "TILE_BYTES", together)
    own, given = documents(length) if packed else None, inputs(length)
    ours = results(attention, given, scale=0.3, window=window, documents=own)
    assert_close(ours, given, 4e-6, own, scale=0.3, window=window)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_tiles_of_any_height_give_the_same(monkeypatch, rows):
    monkeypatch.setattr(cpp_backend, "ROWS", rows)
    given, own = inputs(40), documents(40)
    assert_close(results(attention, given, scale=0.3, window=9, documents=own), given, 4e-6, own, scale=0.3, window=9)


def test_in_bf16_it_is_as_near_as_that():
    given = inputs(200, torch.bfloat16)
    ours = results(attention, given, scale=0.3)
    assert all(tensor.dtype == torch.bfloat16 for tensor in ours)
    assert_close(ours, given, 0.02, scale=0.3)


def test_scores_that_are_not_seen_are_not_read():
    q, k, v = (x.detach() for x in inputs(300))
    own = Documents(torch.arange(300).expand(BATCH, -1) // 140)
    clean = attention(q, k, v, scale=0.3, documents=own)
    k[:, 140:280] = torch.nan
    out = attention(q, k, v, scale=0.3, documents=own)
    assert torch.equal(out[:, :140], clean[:, :140]) and torch.equal(out[:, 280:], clean[:, 280:])
    assert out[:, 140:280].isnan().all()


def test_scores_beyond_what_exp_can_take_neither_overflow_nor_vanish():
    q, k, v = inputs(130)
    assert all(x.isfinite().all() for x in results(attention, (q * 1e3, k * 1e3, v), scale=1.0))
    assert all(x.isfinite().all() for x in results(attention, (-q.abs() * 1e3, k.abs() * 1e3, v), scale=1.0))
    out, *grads = results(attention, (q * 1e-30, k * 1e-10, v), scale=1.0)
    torch.testing.assert_close(out[0, :, 0], v.detach()[0, :, 0].cumsum(0) / torch.arange(1, 131)[:, None], rtol=1e-5, atol=1e-6)
    assert all(grad.isfinite().all() for grad in grads)


def test_nan_in_what_a_query_sees_is_seen():
    q, k, v = (x.detach() for x in inputs(20))
    k[0, 7, 0, 0] = torch.nan
    out = attention(q, k, v, scale=1.0)
    assert out[0, 7:, :3].isnan().all() and out[1:].isfinite().all() and out[0, :, 3:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_of_one_projection_are_read_where_they_are(dtype):
    whole = torch.randn(2, 150, HEADS + 2 * GROUPS, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    views = whole.split((HEADS, GROUPS, GROUPS), dim=2)
    copies = [view.contiguous() for view in views]
    # What autograd gives back may lie in any order too: here heads before positions.
    turned = results(lambda *x, **options: attention(*x, **options).transpose(1, 2).contiguous().transpose(1, 2), views, scale=0.3)
    for mine, true in zip(turned, results(attention, copies, scale=0.3), strict=True):
        assert torch.equal(mine, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_kernel_computes_does_not_depend_on_the_number_of_threads(dtype, monkeypatch):
    """The products between are torch's: here sums over one number, which have no order."""
    threads, made = torch.get_num_threads(), []
    q, k, v = (torch.randn(2, 300, 3, 1, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3))
    kept = torch.empty(2, 300, 3, 2)
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            tiles = cpp_backend._Tiles(q, k, v, 0.5, None, documents(300))
            for tile in list(tiles)[:2]:
                scores, grads = tile.q * tile.k.mT, tile.q * tile.keys(v).mT
                tile.softmax(scores, kept)
                again = tile.q * tile.k.mT
                tile.softmax_backward(again, grads, kept)
                assert torch.equal(scores, again), "probabilities are made with the same bits again"
                made.append((number, scores, grads))
    finally:
        torch.set_num_threads(threads)
    for number, scores, grads in made[2:]:
        first = made[0] if scores.shape == made[0][1].shape else made[1]
        assert torch.equal(scores, first[1]) and torch.equal(grads, first[2]), number


def test_under_autocast_it_multiplies_in_its_dtype():
    q, k, v = inputs(40)
    with torch.autocast("cpu", torch.bfloat16):
        assert refuses(q, k.bfloat16(), v, scale=0.3) is None
        out = attention(q, k, v, scale=0.3)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad.dtype == k.grad.dtype == v.grad.dtype == torch.float32


def test_what_it_cannot_take_is_refused():
    q, k, v = inputs(40)
    assert refuses(q, k, v, scale=1.0) is None
    assert "other numbers of queries than of keys" in refuses(q[:, :3], k, v, scale=1.0)
    assert "single ones" in refuses(q[:, :1], k[:, :1], v[:, :1], scale=1.0)
    assert "float64" in refuses(q.double(), k.double(), v.double(), scale=1.0)
    assert "bfloat16 and float32" in refuses(q, k.bfloat16(), v, scale=1.0)
    with torch.autocast("cpu", torch.float16):
        assert "float16" in refuses(q, k, v, scale=1.0)


def test_documents_seen_in_evaluation_can_be_trained_with_later():
    given, own = inputs(64), documents(64)
    with torch.inference_mode():
        attention(*(x.detach() for x in given), scale=1.0, documents=own)
    attention(*given, scale=1.0, documents=own).sum().backward()
