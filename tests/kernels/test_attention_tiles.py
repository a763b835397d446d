"""Attention in tiles: values and gradients of the whole score matrix, wherever a tile begins or ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zexp.kernels.attention import tiles
from zexp.kernels.attention.reference import attention as reference
from zexp.kernels.attention.torch_backend import attention
from zexp.kernels.documents import Documents

BATCH, HEADS, GROUPS, WIDTH, VALUES = 3, 6, 2, 8, 5


def inputs(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(length)
    shapes = ((HEADS, WIDTH), (GROUPS, WIDTH), (GROUPS, VALUES))
    return [torch.randn(BATCH, length, *shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]


def documents(length: int) -> Documents:
    starts = torch.rand(BATCH, length, generator=torch.Generator().manual_seed(1)) < 0.05
    return Documents(starts.cumsum(1))


@pytest.mark.parametrize("together", [1, 1 << 19], ids=["one pair a tile", "all pairs"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("window", [None, 1, 7, 128, 150])
@pytest.mark.parametrize("length", [2, 127, 128, 129, 300])
def test_values_and_gradients_are_those_of_the_whole_matrix(monkeypatch, length, window, packed, together):
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", together)
    own = documents(length) if packed else None
    q, k, v = inputs(length)
    out = attention(q, k, v, scale=0.3, window=window, documents=own)
    expected = reference(q, k, v, scale=0.3, window=window, documents_BT=None if own is None else own.ids_BT)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_gradient_is_the_finite_difference(monkeypatch):
    monkeypatch.setattr(tiles, "ROWS", 3)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, scale=0.5, window=4, documents=documents(8)), inputs(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_keep_theirs_and_are_as_near_as_their_precision(dtype):
    exact = inputs(200)
    rough = [x.detach().to(dtype).requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in rough]
    out = attention(*rough, scale=0.3)
    expected = reference(*exact, scale=0.3)
    assert out.dtype == dtype
    error = {torch.float32: 2e-6, torch.bfloat16: 0.02}[dtype]
    assert (out.double() - expected).abs().max() < error * expected.abs().max()
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad(out, rough, dout.to(dtype))
    theirs = torch.autograd.grad(expected, exact, dout.to(dtype).double())
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).abs().max() < error * other.abs().max()


def test_under_autocast_it_multiplies_in_its_dtype():
    q, k, v = (x.detach().float().requires_grad_() for x in inputs(40))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, scale=0.3)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad.dtype == k.grad.dtype == v.grad.dtype == torch.float32


def test_scores_beyond_what_exp_can_take_neither_overflow_nor_vanish():
    q, k, v = inputs(130, torch.float32)
    out = attention(q * 1e3, k * 1e3, v, scale=1.0)
    assert out.isfinite().all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)


def test_masks_made_in_inference_mode_can_be_trained_with_later():
    with torch.inference_mode():
        attention(*(x.detach() for x in inputs(64)), scale=1.0)
    attention(*inputs(64), scale=1.0).sum().backward()
