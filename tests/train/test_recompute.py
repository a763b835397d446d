"""Activation checkpointing: layers that keep their inputs alone give the same bits."""

from __future__ import annotations

import pytest
import torch

from tests.train.runs import chain, differing, metrics, store_beside, tensors, train_all
from tests.train.test_every_architecture import TINY, batch, model_of
from zexp.calc import memory
from zexp.calc.layout import Layout
from zexp.train import machine
from zexp.train.step import backward


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", TINY)
def test_loss_gradients_and_counts_are_the_same_bits(arch, precision):
    found = []
    for recomputes in (False, True):
        model = model_of(arch)
        model.recomputes = recomputes
        loss = backward(model, batch(), micro_batch=2, precision=precision, document_mask=True)
        gradients = [None if p.grad is None else p.grad for p in model.parameters()]
        found.append([loss, *gradients, *model.step_counts()])
    assert len(found[0]) == len(found[1])
    for kept, again in zip(*found, strict=True):
        assert (kept is None) == (again is None) and (kept is None or torch.equal(kept, again))


def test_what_a_layer_computes_is_not_kept():
    kept = []
    for recomputes in (False, True):
        model, tokens = model_of("transformer_tiny"), batch().inputs_BT
        model.recomputes = recomputes
        model(tokens)  # tables of angles are made
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            hidden = model(tokens)
        assert hidden.requires_grad
        elements = hidden.numel()
        del hidden  # only now, and not while the next one is profiled
        events = profile.profiler.kineto_results.events()
        kept.append(sum(event.nbytes() for event in events if event.name() == "[memory]"))
    inputs = (len(model.layers) + 2) * 4 * elements
    assert inputs / 2 < kept[1] < 1.2 * inputs < kept[0] / 3


def test_evaluation_computes_once():
    model = model_of("mamba2_tiny").eval()
    model.recomputes = True
    calls = []
    model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(batch().inputs_BT)
    assert len(calls) == 1


@pytest.mark.parametrize("arch", ["zamba2", "moe"])
def test_a_training_has_the_same_bits_and_the_same_fingerprint(tiny_store, tiny_corpus, arch):
    whole = chain(tiny_corpus, 6, arch=arch)
    other = store_beside(tiny_store, "other")
    train_all(tiny_store, whole, activation_checkpointing="none")
    train_all(other, whole, activation_checkpointing="full")
    last = whole.segments[-1]
    assert differing(tensors(tiny_store, last), tensors(other, last)) == []
    none, full = (store.folder("trajectory", last.id) for store in (tiny_store, other))
    assert [line["loss"] for line in metrics(none)] == [line["loss"] for line in metrics(full)]
    said = [record.log.read_text() for record in (*none.attempts(), *full.attempts())]
    assert ["computed again in the backward pass" in text for text in said] == [False, True]
    names = [text.partition("Fingerprint ")[2][:16] for text in said]
    assert names[0] == names[1]


def test_auto_looks_at_the_gpu_and_at_no_cpu(monkeypatch):
    model = model_of("transformer_tiny").semantic
    segment, sizes = {"seq_len": 512, "precision": "bf16"}, {"seq_len": 512, "micro_batch": 8, "precision": "bf16"}
    taken = memory.training(model, Layout(), **sizes).total

    def recomputes(setting: str, device: str, room: int) -> bool:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room // 2, room))
        return machine.recomputes(model, segment, {"activation_checkpointing": setting, "micro_batch": 8}, device)

    small, large = int(taken / 0.91), int(taken / 0.89)
    assert recomputes("auto", "cuda:0", small) and not recomputes("auto", "cuda:0", large)
    assert not recomputes("auto", "cpu", small)
    assert recomputes("full", "cpu", large) and not recomputes("none", "cuda:0", small)
