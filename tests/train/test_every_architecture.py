"""Every small preset learns: a few optimizer steps on one batch, in both precisions, cut into micro-batches or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from zexp.blocks.resolve import resolve_model
from zexp.model.build import build, decayed
from zexp.model.language_model import LanguageModel
from zexp.train import optimizer
from zexp.train.batches import Batch
from zexp.train.step import backward

CONF = Path(__file__).parents[2] / "conf/arch"
TINY = sorted(path.stem for path in CONF.glob("*_tiny.yaml"))
VOCAB, BATCH, LENGTH = 128, 4, 64
OPTIM = {"kind": "adamw", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}


def batch() -> Batch:
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(LENGTH) // 24).expand(BATCH, -1)
    return Batch(inputs_BT=tokens[:, :-1], labels_BT=tokens[:, 1:], documents_BT=documents)


def model_of(arch: str) -> LanguageModel:
    model = resolve_model(OmegaConf.to_container(OmegaConf.load(CONF / f"{arch}.yaml")), VOCAB)
    return build(model, seed=0).train()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", TINY)
def test_it_learns_a_batch_by_heart(arch, precision):
    model, data = model_of(arch), batch()
    adam = optimizer.build(model, OPTIM, decayed(model))
    losses = []
    for _ in range(8):
        losses.append(backward(model, data, micro_batch=4, precision=precision, document_mask=True).item())
        optimizer.clip(model, 1.0)
        optimizer.step(adam, 3e-3)
        model.after_step()
    assert all(loss < 2 * losses[0] for loss in losses) and losses[-1] < losses[0] - 0.3, losses


@pytest.mark.parametrize("arch", TINY)
def test_gradients_do_not_depend_on_the_micro_batch(arch):
    gradients = []
    for micro_batch in (4, 1):
        model = model_of(arch)
        backward(model, batch(), micro_batch=micro_batch, precision="fp32", document_mask=True)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()
