"""What is learned by a rule and not by a gradient is part of a state: the biases that balance experts."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from tests.train import runs
from tests.train.runs import STEP, chain, differing, tensors, train
from zexp.train import checkpoint, loop

BIAS = "weights/layers.1.branches.e.choice_bias"


def test_stopped_and_resumed_it_ends_with_the_same_bits(tiny_store, tiny_corpus, monkeypatch):
    (segment,) = chain(tiny_corpus, 8, arch="moe").segments
    folder = runs.create(tiny_store, segment)
    backward = loop.backward

    def told_during_the_third_step(*args, **kwargs):
        if folder.last_attempt().metrics()[-1:] and folder.last_attempt().metrics()[-1]["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(*args, **kwargs)

    monkeypatch.setattr(loop, "backward", told_during_the_third_step)
    assert train(tiny_store, segment, log_every=1) == "interrupted"
    assert folder.states() == [3 * STEP]
    monkeypatch.undo()
    at_three = tensors(tiny_store, segment, 3 * STEP)[BIAS]
    assert 0 < at_three.abs().max() < 0.031, "three steps of 0.01 at most"

    assert train(tiny_store, segment) == "done"
    undisturbed = runs.store_beside(tiny_store, "undisturbed")
    train(undisturbed, segment)
    assert differing(tensors(tiny_store, segment), tensors(undisturbed, segment)) == []
    assert tensors(tiny_store, segment)[BIAS].abs().max() > at_three.abs().max()


def test_a_fork_and_an_evaluation_begin_with_the_biases(tiny_store, tiny_corpus):
    whole = chain(tiny_corpus, 3, arch="moe", then=runs.anneal(1, fraction=0.5, optimizer_state="reset"))
    runs.train_all(tiny_store, whole)
    before, after = (tensors(tiny_store, segment)[BIAS] for segment in whole.segments)
    assert 0 < (after - before).abs().max() < 0.011, "one step of 0.01 from where the parent was"
    model, _, _ = checkpoint.load_model(tiny_store, whole.segments[1].id, 4 * STEP)
    assert torch.equal(model.layers[1].branches["e"].choice_bias, after) and not model.training


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_loads_are_those_of_the_whole_batch(tiny_store, tiny_corpus, micro_batch):
    (segment,) = chain(tiny_corpus, 2, arch="moe").segments
    train(tiny_store, segment)
    other = runs.store_beside(tiny_store, "other")
    train(other, segment, micro_batch=micro_batch)
    assert torch.equal(tensors(tiny_store, segment)[BIAS], tensors(other, segment)[BIAS])
