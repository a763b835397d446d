import json
import math

import pytest
import torch

from tests.train import runs
from tests.train.runs import STEP, chain, differing, metrics, tensors, train, train_all
from zexp.config.schema import Optim, Schedule
from zexp.store.errors import StoreError
from zexp.train import loop, schedule


@pytest.mark.parametrize("arch", ["transformer", "zamba2"])
def test_a_training_learns(tiny_store, tiny_corpus, arch):
    whole = chain(tiny_corpus, 24, arch=arch)
    train_all(tiny_store, whole, log_every=1)
    losses = [line["loss"] for line in metrics(tiny_store.folder("trajectory", whole.segments[-1].id))]
    assert losses[0] == pytest.approx(math.log(tiny_corpus.vocab_size), abs=0.3)
    assert losses[-1] < losses[0] - 0.3


def test_the_metrics_say_what_happened_at_each_step(tiny_store, tiny_corpus):
    whole = chain(tiny_corpus, 8, schedule=runs.wsd(3))
    train_all(tiny_store, whole, log_every=1)
    lines = [line for s in whole.segments for line in metrics(tiny_store.folder("trajectory", s.id))]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["tokens"] for line in lines] == [STEP * n for n in range(1, 9)]
    pieces = [piece for segment in whole.segments for piece in segment.semantic["lr"]]
    assert pieces[-1]["shape"] == "one_minus_sqrt"
    for line in lines:
        segment = whole.segments[0] if line["tokens"] <= whole.segments[0].to else whole.segments[1]
        assert line["lr"] == schedule.lr(segment.semantic["lr"], line["tokens"] - STEP / 2) > 0
        assert line["grad_norm"] > 0 and line["tokens_per_second"] > 0


def test_progress_ends_at_the_target(tiny_store, tiny_corpus):
    whole = chain(tiny_corpus, 3)
    train_all(tiny_store, whole)
    record = tiny_store.folder("trajectory", whole.segments[0].id).last_attempt()
    progress = record.progress()
    assert (progress["done"], progress["total"], progress["unit"]) == (3 * STEP, 3 * STEP, "tokens")
    assert progress["loss"] > 0 and progress["eta_seconds"] == 0


def test_how_often_it_logs_and_saves_changes_no_bit(tiny_store, tiny_corpus):
    (segment,) = chain(tiny_corpus, 8).segments
    train(tiny_store, segment)
    other = runs.store_beside(tiny_store, "other")
    train(other, segment, log_every=1, checkpoint={"every_seconds": 0, "rolling": 1}, keep=[3 * STEP])
    assert differing(tensors(tiny_store, segment), tensors(other, segment)) == []
    a, b = (metrics(store.folder("trajectory", segment.id))[-1] for store in (tiny_store, other))
    assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
    assert other.folder("trajectory", segment.id).states() == [STEP * n for n in (3, 7, 8)]


def test_extending_a_trunk_is_training_it_straight(tiny_store, tiny_corpus):
    short, long = chain(tiny_corpus, 4).segments[0], chain(tiny_corpus, 8).segments[0]
    assert short.id == long.id
    train(tiny_store, short)
    train(tiny_store, long)
    straight = runs.store_beside(tiny_store, "straight")
    train(straight, long)
    assert differing(tensors(tiny_store, long), tensors(straight, long)) == []


def test_a_longer_wsd_shares_the_trunk_of_a_shorter_one(tiny_store, tiny_corpus):
    short, long = (chain(tiny_corpus, steps, schedule=runs.wsd(2)) for steps in (6, 10))
    assert short.segments[0].id == long.segments[0].id
    train_all(tiny_store, short)
    train_all(tiny_store, long)
    straight = runs.store_beside(tiny_store, "straight")
    train_all(straight, long)
    assert differing(tensors(tiny_store, long.segments[-1]), tensors(straight, long.segments[-1])) == []
    trunk = tiny_store.folder("trajectory", long.segments[0].id)
    assert trunk.states() == [4 * STEP, 8 * STEP]
    assert [line["tokens"] for line in metrics(trunk)] == [4 * STEP, 8 * STEP], "the first four steps are trained once"


def test_a_fork_that_changes_nothing_is_continuing(tiny_store, tiny_corpus):
    (straight,) = chain(tiny_corpus, 8).segments
    # The same rate, all replay, the optimizer carried: a segment of its own only because its learning rate ends.
    flat = Schedule(kind="constant", peak_lr=3e-3)
    whole = chain(
        tiny_corpus,
        4,
        schedule=flat,
        then=runs.anneal(4, fraction=1.0, shape="linear", peak_fraction=1.0, floor_fraction=1.0),
    )
    fork = whole.segments[-1]
    assert fork.semantic["parent"] == {"id": straight.id, "tokens": 4 * STEP}
    train_all(tiny_store, whole)
    train(tiny_store, straight)
    assert differing(tensors(tiny_store, straight), tensors(tiny_store, fork)) == []


def test_a_reset_optimizer_begins_anew(tiny_store, tiny_corpus):
    ends = {}
    for state in ("carry", "reset"):
        whole = chain(tiny_corpus, 4, then=runs.anneal(4, fraction=0.5, optimizer_state=state))
        train_all(tiny_store, whole)
        ends[state] = tensors(tiny_store, whole.segments[-1])
    name = "optimizer/norm.weight.step"
    assert (ends["carry"][name].item(), ends["reset"][name].item()) == (8, 4)
    assert differing(ends["carry"], ends["reset"])


def test_a_state_says_what_it_is(tiny_store, tiny_corpus):
    whole = chain(tiny_corpus, 4, then=runs.anneal(4, fraction=0.5))
    train(tiny_store, whole.segments[0])
    train(tiny_store, whole.segments[1], micro_batch=2)
    state = tiny_store.folder("trajectory", whole.segments[1].id).state(8 * STEP)
    facts = json.loads((state / "state.json").read_text())
    assert (facts["tokens"], facts["step"]) == (8 * STEP, 8)
    assert facts["cursors"] == {tiny_corpus.packings["base"]: 24, tiny_corpus.packings["better"]: 8}
    first, second = facts["fingerprints"]
    assert (first["from"], first["to"], second["from"], second["to"]) == (0, 4 * STEP, 4 * STEP, 8 * STEP)
    details = facts["fingerprint_details"]
    assert [details[part["fingerprint"]]["micro_batch"] for part in (first, second)] == [4, 2]
    assert details[first["fingerprint"]]["threads"] == 1
    assert not [file for file in state.rglob("*") if file.suffix not in (".json", ".safetensors") and file.is_file()]


def test_a_training_draws_no_random_numbers(tiny_store, tiny_corpus):
    before = torch.get_rng_state()
    train_all(tiny_store, chain(tiny_corpus, 2))
    assert torch.equal(before, torch.get_rng_state())


def test_a_training_leaves_the_process_as_it_was(tiny_store, tiny_corpus):
    def settings():
        return torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()

    before = settings()
    train_all(tiny_store, chain(tiny_corpus, 1), threads=1)
    assert settings() == before


def test_bf16_keeps_weights_and_optimizer_in_fp32(tiny_store, tiny_corpus):
    whole = chain(tiny_corpus, 6, precision="bf16")
    train_all(tiny_store, whole, log_every=1)
    assert {tensor.dtype for tensor in tensors(tiny_store, whole.segments[0]).values()} == {torch.float32}
    full = chain(tiny_corpus, 6)
    train_all(tiny_store, full, log_every=1)
    a, b = (metrics(tiny_store.folder("trajectory", c.segments[0].id))[-1]["loss"] for c in (whole, full))
    assert a != b
    assert a == pytest.approx(b, abs=0.02)  # bf16 resolves 1/256; six steps do not add up to more


def test_losing_the_way_is_a_recorded_result(tiny_store, tiny_corpus):
    (segment,) = chain(tiny_corpus, 60, schedule=Schedule(kind="constant", peak_lr=1e3), optim=Optim(clip=0.0)).segments
    assert train(tiny_store, segment, log_every=1, divergence={"margin": 2.0, "steps": 4}) == "diverged"
    folder = tiny_store.folder("trajectory", segment.id)
    found = folder.diverged()
    assert found["tokens"] % STEP == 0 and found["tokens"] <= segment.to
    assert "above ln V" in found["reason"] or "is nan" in found["reason"]
    assert metrics(folder)[-1]["tokens"] == found["tokens"]

    assert train(tiny_store, segment) == "diverged"
    assert len(metrics(folder)) == found["tokens"] // STEP, "it is cached: nothing was trained again"
    assert train(tiny_store, segment, to=found["tokens"] - STEP) == "done", "what comes before it can be had"
    assert train(tiny_store, segment, retry_diverged=True, divergence={"margin": 2.0, "steps": 4}) == "diverged"
    assert folder.diverged() == found


def test_a_loss_that_is_not_a_number_is_a_recorded_result(tiny_store, tiny_corpus, monkeypatch):
    (segment,) = chain(tiny_corpus, 6).segments
    good = loop.backward
    calls = []

    def breaks_at_the_third(*args, **kwargs):
        calls.append(1)
        return good(*args, **kwargs) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(loop, "backward", breaks_at_the_third)
    assert train(tiny_store, segment, keep=[2 * STEP, 3 * STEP]) == "diverged"
    folder = tiny_store.folder("trajectory", segment.id)
    assert folder.diverged() == {"tokens": 3 * STEP, "reason": "step 3: the loss is nan"}
    assert folder.states() == [2 * STEP]
    monkeypatch.undo()
    assert train(tiny_store, segment, retry_diverged=True) == "done"
    assert folder.diverged() is None


def test_a_missing_parent_is_said(tiny_store, tiny_corpus):
    whole = chain(tiny_corpus, 4, then=runs.anneal(4, fraction=0.5))
    runs.create(tiny_store, whole.segments[0])
    with pytest.raises(StoreError, match="has no states/512"):
        train(tiny_store, whole.segments[1])


def test_a_state_between_two_steps_is_refused(tiny_store, tiny_corpus):
    (segment,) = chain(tiny_corpus, 4).segments
    with pytest.raises(ValueError, match=r"no optimizer step of .* ends at 200 tokens"):
        train(tiny_store, segment, keep=[200])
