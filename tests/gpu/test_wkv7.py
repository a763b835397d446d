"""RWKV-7's state update against flash-linear-attention's kernel, where there is a GPU and that package."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zexp.kernels.documents import Documents
from zexp.kernels.wkv7.torch_backend import FASTEST, wkv7, wkv7_continue

fla = pytest.importorskip("fla.ops.rwkv7", reason="flash-linear-attention is not installed")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

HEADS, WIDTH = 2, 64


def inputs(length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    r, w, k, v, kappa, a = (torch.randn(1, length, HEADS, WIDTH, generator=generator) for _ in range(6))
    made = [r, -FASTEST * (3 * w).sigmoid(), k, v, F.normalize(kappa, dim=-1), a.sigmoid()]
    return [tensor.cuda().requires_grad_() for tensor in made]


def theirs(r, w, k, v, kappa, a, **options):
    """It takes the removal as S (a b^T) with a = -kappa and b = a * kappa."""
    return fla.chunk_rwkv7(r=r, w=w, k=k, v=v, a=-kappa, b=kappa * a, scale=1.0, **options)


def assert_close(ours: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Relative to the largest: their products run in TF32."""
    error = (ours - wanted).abs().max() / wanted.abs().max()
    assert error < tolerance, f"{error:.1e}"


@pytest.mark.parametrize("lengths", [[256], [200], [100, 1, 32, 123]], ids=str)
def test_outputs_and_gradients(lengths):
    made = inputs(sum(lengths))
    packed = len(lengths) > 1
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].cuda()
    ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).cuda()
    ours = wkv7(*made, documents=Documents(ids) if packed else None)
    wanted, _ = theirs(*made, cu_seqlens=ends if packed else None)
    assert_close(ours, wanted, 5e-3)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).cuda()
    mine = torch.autograd.grad((ours * weights).sum(), made)
    for left, right in zip(mine, torch.autograd.grad((wanted * weights).sum(), made), strict=True):
        assert_close(left, right, 1e-2)


def test_final_state():
    made = [tensor.detach() for tensor in inputs(96)]
    _, wanted = theirs(*made, output_final_state=True)
    _, ours = wkv7_continue(*made, torch.zeros(1, HEADS, WIDTH, WIDTH, device="cuda"))
    assert_close(ours, wanted, 5e-3)
