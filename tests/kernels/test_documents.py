"""What operations derive from document boundaries is made once, shared by layers, and never written into."""

import pytest
import torch

from zexp.kernels.attention.torch_backend import attention_by_torch as attention
from zexp.kernels.chunks import chunk_masks, masks_of_each_chunk
from zexp.kernels.documents import Documents
from zexp.kernels.gated_delta.torch_backend import gated_delta
from zexp.kernels.mlstm.torch_backend import mlstm
from zexp.kernels.retention.torch_backend import retention
from zexp.kernels.ssd.torch_backend import ssd
from zexp.kernels.wkv7.torch_backend import wkv7

IDS_BT = torch.tensor([[0] * 13 + [1] * 9 + [2] * 15, [3] * 30 + [4] * 7])
B, T, H, N = *IDS_BT.shape, 2, 4


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def wide():
    return draw(B, T, H, N).requires_grad_()


def gate():
    return draw(B, T, H).sigmoid().requires_grad_()


OPERATIONS = {
    "attention": lambda d: attention(wide(), wide(), wide(), scale=0.5, documents=d),
    "attention in a window": lambda d: attention(wide(), wide(), wide(), scale=0.5, window=20, documents=d),
    "attention in blocks": lambda d: attention(wide(), wide(), wide(), scale=0.5, window=5, documents=d),
    "gated_delta": lambda d: gated_delta(wide(), wide(), wide(), -gate(), gate(), chunk=8, documents=d),
    "mlstm": lambda d: mlstm(wide(), wide(), wide(), gate(), -gate(), scale=0.5, eps=1e-6, chunk=8, documents=d),
    "retention": lambda d: retention(wide(), wide(), wide(), (-0.1, -0.2), scale=0.5, chunk=8, documents=d),
    "ssd": lambda d: ssd(wide(), gate(), -torch.ones(H), wide(), wide(), torch.ones(H), chunk=8, documents=d),
    "wkv7": lambda d: wkv7(wide(), -0.6 * wide().sigmoid(), wide(), wide(), wide().tanh() / 2, wide(), documents=d),
}


def tensors_of(made):
    if isinstance(made, torch.Tensor):
        return [made]
    return [tensor for part in made or () for tensor in tensors_of(part)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_layers_share_what_is_made_and_leave_it_as_it_is(name):
    documents = Documents(IDS_BT)
    OPERATIONS[name](documents).sum().backward()
    first = {key: [(tensor, tensor.clone()) for tensor in tensors_of(made)] for key, made in documents._made.items()}
    assert first
    OPERATIONS[name](documents).sum().backward()
    assert documents._made.keys() == first.keys()
    for key, made in documents._made.items():
        for tensor, (same, before) in zip(tensors_of(made), first[key], strict=True):
            assert tensor is same
            assert torch.equal(tensor, before)


def test_masks_of_different_operations_and_chunks_do_not_mix():
    shared = Documents(IDS_BT)
    for run in OPERATIONS.values():
        assert torch.equal(run(shared), run(Documents(IDS_BT)))
    for chunk in (8, 16, 37, 64):
        each = masks_of_each_chunk(shared, chunk, torch.float64)
        assert [len(one.entry_B1Q1[0, 0]) for one in each] == [min(chunk, T - at) for at in range(0, T, chunk)]
    assert chunk_masks(shared, 8, torch.float32) is chunk_masks(shared, 8, torch.float32)
    assert chunk_masks(shared, 8, torch.float32).pair_BCQQ.dtype == torch.float32


def test_chunk_masks_are_what_they_say():
    chunk = 8
    masks = chunk_masks(Documents(IDS_BT), chunk, torch.float64)
    for b in range(B):
        for t in range(T):
            c, i = divmod(t, chunk)
            for j in range(chunk):
                s = c * chunk + j
                assert masks.pair_BCQQ[b, c, i, j] == (s <= t and IDS_BT[b, s] == IDS_BT[b, t])
            assert masks.entry_BCQ[b, c, i] == (IDS_BT[b, t] == IDS_BT[b, max(c * chunk - 1, 0)])
            assert masks.exit_BCQ[b, c, i] == (IDS_BT[b, t] == IDS_BT[b, min((c + 1) * chunk, T) - 1])


@pytest.mark.parametrize("window", [5, 20])
def test_a_window_made_in_evaluation_serves_training(window):
    def run():
        return attention(wide(), wide(), wide(), scale=0.25, window=window)

    with torch.inference_mode():
        evaluated = run()
    trained = run()
    trained.sum().backward()
    assert torch.equal(evaluated, trained)
