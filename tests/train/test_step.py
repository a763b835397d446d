import pytest
import torch

from tests.train.runs import ARCHS
from zexp.blocks.resolve import resolve_model
from zexp.model.build import build
from zexp.train.batches import Batch
from zexp.train.step import backward


def batch(sequences=8, length=32):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 300, (sequences, length + 1), generator=generator)
    documents = (torch.rand(sequences, length, generator=generator) < 0.1).cumsum(1)
    return Batch(tokens[:, :-1], tokens[:, 1:], documents)


def gradients(arch, micro_batch, document_mask=True):
    model = build(resolve_model(ARCHS[arch], 300), seed=0)
    loss = backward(model, batch(), micro_batch=micro_batch, precision="fp32", document_mask=document_mask)
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("arch", ["transformer", "zamba2"])
def test_the_micro_batch_does_not_change_the_gradient(arch):
    loss, whole = gradients(arch, 8)
    for micro_batch in (1, 2, 3, 4):
        split_loss, split = gradients(arch, micro_batch)
        # Sums of fp32 in another order: 1e-5 of the largest gradient is some 80 units in its last place.
        assert (split - whole).abs().max() <= 1e-5 * whole.abs().max()
        assert split_loss == pytest.approx(loss, rel=1e-6)


def test_the_document_mask_reaches_the_model():
    assert gradients("transformer", 8, document_mask=True)[0] != gradients("transformer", 8, document_mask=False)[0]


def test_an_unknown_precision_is_refused():
    model = build(resolve_model(ARCHS["transformer"], 300), seed=0)
    with pytest.raises(ValueError, match="precision = 'fp16'; one of: fp32, bf16"):
        backward(model, batch(), micro_batch=8, precision="fp16", document_mask=True)
