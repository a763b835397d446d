"""Marks in a model's passes: every part is seen in both, their times sum to the whole, and nothing changes by being watched."""

import time
from typing import Any

import pytest
import torch

from zexp.bench.marks import BACKWARD, BETWEEN, EMBEDDING, FINAL_NORM, FORWARD, HEAD, Marks, Spell, counts, lapped, mean
from zexp.blocks.resolve import resolve_model
from zexp.model.build import build
from zexp.train.batches import Batch
from zexp.train.step import backward

ARCH: dict[str, Any] = {
    "pattern": "m gm a d (a|m) gm k k",
    "width": 16,
    "blocks": {
        "a": {"heads": 2},
        "d": {"width": 20},
        "m": {"state_size": 4, "head_dim": 8, "chunk": 8},
        "g": {"heads": 2, "mlp_width": 12, "copies": 2},
        "k": {"head_dim": 8, "lora_rank": {"decay": 4, "rate": 4, "value": 4, "gate": 4}},
    },
}


@pytest.fixture
def model():
    return build(resolve_model(ARCH, 50), seed=0).train()


@pytest.fixture
def batch():
    tokens = torch.randint(50, (4, 13), generator=torch.Generator().manual_seed(0))
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(4, 12, dtype=torch.int32))


def passes(model, batch):
    model.zero_grad(set_to_none=True)
    return backward(model, batch, micro_batch=2, precision="fp32", document_mask=False)


def test_each_part_is_at_work_in_both_passes(model, batch):
    laps: list[Any] = []
    lapped(Marks(model, "cpu"), lambda: passes(model, batch), laps)()
    parts = {"m", "g", "a", "d", "a|m", "k", EMBEDDING, FINAL_NORM}
    assert set(laps[0]) == {Spell(part, way) for part in parts for way in (FORWARD, BACKWARD)} | {Spell(HEAD, FORWARD), Spell(BETWEEN, FORWARD)}
    assert all(took >= 0 for took in laps[0].values())


def test_a_slow_part_is_the_one_that_is_found_slow(model, batch):
    """Time spent in one layer, forward, and in one layer's backward pass, is theirs."""

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            time.sleep(0.05)
            return grad

    mlp, attention = model.layers[3].branches["d"], model.layers[2].branches["a"]
    forward_d, forward_a = mlp.forward, attention.forward
    mlp.forward = lambda x, context: (time.sleep(0.05), forward_d(x, context))[1]
    attention.forward = lambda x, context: Slow.apply(forward_a(x, context))
    marks, laps = Marks(model, "cpu"), []
    lapped(marks, lambda: passes(model, batch), laps)()
    (lap,) = laps
    # Two micro-batches of 0.05 s, which no other part can have had.
    assert lap[Spell("d", FORWARD)] >= 0.1 and lap[Spell("a", BACKWARD)] >= 0.1


def test_the_times_of_all_spells_are_the_whole(model, batch):
    laps: list[Any] = []
    run = lapped(Marks(model, "cpu"), lambda: passes(model, batch), laps)
    began = time.perf_counter()
    run()
    whole = time.perf_counter() - began
    assert 0 < sum(laps[0].values()) <= whole


def test_being_watched_changes_no_bit_and_leaves_no_hook(model, batch):
    loss = passes(model, batch)
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    marks = Marks(model, "cpu")
    with marks.watching():
        watched = passes(model, batch)
    assert torch.equal(loss, watched)
    assert all(torch.equal(plain[name], parameter.grad) for name, parameter in model.named_parameters())
    assert marks.taken()
    passes(model, batch)
    assert marks.taken() == {}


def test_parts_are_counted_as_they_stand_in_a_pattern():
    layers = ["m", "gm", "a", "d", "(a|m)", "gm", "k", "k"]
    assert counts(layers) == {"m": 3, "g": 2, "a": 1, "d": 1, "a|m": 1, "k": 2}


def test_a_mean_counts_laps_in_which_a_spell_is_missing():
    one, other = Spell("a", FORWARD), Spell("d", FORWARD)
    assert mean([{one: 1.0, other: 3.0}, {one: 2.0}]) == {one: 1.5, other: 1.5}
