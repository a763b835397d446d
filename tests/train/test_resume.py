"""What survives a kill, a signal and a damaged disk: the same bits."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import zexp
from tests.train import runs
from tests.train.runs import STEP, chain, differing, tensors, train
from zexp.store import files, retention
from zexp.train import checkpoint, loop

REPOSITORY = Path(zexp.__file__).parent.parent


@pytest.fixture
def start(tiny_store):
    """start(segment, **request) trains it in a fresh process."""
    processes = []

    def start_worker(segment, **changes):
        runs.create(tiny_store, segment)
        asked = json.dumps(runs.request(segment.to, **changes))
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.worker", str(tiny_store.root), segment.id, asked],
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
        )
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start_worker
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_for_a_state(folder, process):
    while not folder.states():
        assert process.poll() is None, "the training ended before it could be disturbed"
        time.sleep(0.005)


def test_killed_at_a_random_step_and_run_again_it_ends_with_the_same_bits(tiny_store, tiny_corpus, start):
    (segment,) = chain(tiny_corpus, 100, arch="zamba2").segments
    folder = runs.create(tiny_store, segment)
    often = {"checkpoint": {"every_seconds": 0, "rolling": 2}}
    first = start(segment, **often)
    wait_for_a_state(folder, first)
    time.sleep(random.uniform(0, 0.3))  # in a step, in a write, between two files of a state …
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    left = folder.states()
    assert left and left[-1] < segment.to

    again = start(segment)
    assert again.stdout.read() == "done\n"
    undisturbed = runs.store_beside(tiny_store, "undisturbed")
    train(undisturbed, segment)
    assert differing(tensors(tiny_store, segment), tensors(undisturbed, segment)) == []
    resumed = [line["tokens"] for line in folder.attempts()[-1].metrics()]
    assert resumed[0] > left[-1], "it went on from the last state, not from the beginning"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_told_to_stop_it_saves_and_goes_on_later_with_the_same_bits(tiny_store, tiny_corpus, monkeypatch, number):
    (segment,) = chain(tiny_corpus, 8).segments
    folder = runs.create(tiny_store, segment)
    backward = loop.backward

    def told_during_the_third_step(*args, **kwargs):
        if folder.last_attempt().metrics()[-1:] and folder.last_attempt().metrics()[-1]["step"] == 2:
            os.kill(os.getpid(), number)
        return backward(*args, **kwargs)

    monkeypatch.setattr(loop, "backward", told_during_the_third_step)
    assert train(tiny_store, segment, log_every=1) == "interrupted"
    assert folder.states() == [3 * STEP]
    assert folder.last_attempt().failure() is None
    monkeypatch.undo()

    assert train(tiny_store, segment) == "done"
    undisturbed = runs.store_beside(tiny_store, "undisturbed")
    train(undisturbed, segment)
    assert differing(tensors(tiny_store, segment), tensors(undisturbed, segment)) == []


def test_stopped_before_its_first_step_a_fork_leaves_no_state(tiny_store, tiny_corpus, monkeypatch):
    whole = chain(tiny_corpus, 2, then=runs.anneal(2, fraction=0.5))
    train(tiny_store, whole.segments[0])
    begin = loop.begin

    def interrupted_while_loading(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return begin(*args)

    monkeypatch.setattr(loop, "begin", interrupted_while_loading)
    assert train(tiny_store, whole.segments[1]) == "interrupted"
    assert tiny_store.folder("trajectory", whole.segments[1].id).states() == []


@pytest.mark.parametrize("file", ["weights/model-00001-of-00001.safetensors", "state.json"])
def test_a_damaged_state_is_set_aside_and_the_one_before_it_is_taken(tiny_store, tiny_corpus, file):
    (segment,) = chain(tiny_corpus, 8).segments
    train(tiny_store, segment, to=4 * STEP, keep=[2 * STEP])
    folder = tiny_store.folder("trajectory", segment.id)
    damage(folder.state(4 * STEP) / file)

    assert train(tiny_store, segment, log_every=1) == "done"
    assert f"The state at {4 * STEP} tokens is damaged" in folder.last_attempt().log.read_text()
    assert [line["tokens"] for line in folder.last_attempt().metrics()] == [STEP * n for n in range(3, 9)]
    assert folder.states() == [2 * STEP, 8 * STEP]
    assert list(folder.last_attempt().path.glob("damaged-*"))
    undisturbed = runs.store_beside(tiny_store, "undisturbed")
    train(undisturbed, segment)
    assert differing(tensors(tiny_store, segment), tensors(undisturbed, segment)) == []


def test_with_every_state_damaged_it_begins_anew(tiny_store, tiny_corpus):
    (segment,) = chain(tiny_corpus, 3).segments
    train(tiny_store, segment, keep=[STEP])
    folder = tiny_store.folder("trajectory", segment.id)
    before = tensors(tiny_store, segment)
    for tokens in folder.states():
        damage(folder.state(tokens) / "state.json")
    assert train(tiny_store, segment) == "done"
    assert differing(before, tensors(tiny_store, segment)) == []


def damage(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def test_a_dropped_optimizer_is_made_again_to_the_bit_and_put_back(tiny_store, tiny_corpus):
    whole = chain(tiny_corpus, 4, arch="zamba2", schedule=runs.wsd(1))
    runs.train_all(tiny_store, whole)
    decay = whole.segments[-1]
    folder = tiny_store.folder("trajectory", decay.id)
    before = tensors(tiny_store, decay)
    assert retention.drop_optimizer(folder, decay.to)
    state = folder.state(decay.to)
    assert folder.trainable(decay.to) is None and not (state / "optimizer").exists()
    folder.verify(state)
    assert checkpoint.load_model(tiny_store, decay.id, decay.to), "it can still be scored"
    assert train(tiny_store, decay) == "done" and folder.trainable(decay.to) is None, "the weights are all it has to have"
    assert train(tiny_store, decay, optimizer=True) == "done"
    assert folder.trainable(decay.to) == state
    assert differing(tensors(tiny_store, decay), before) == []
    folder.verify(state)


def test_weights_of_other_bits_are_set_aside_when_the_optimizer_is_made_again(tiny_store, tiny_corpus):
    (segment,) = chain(tiny_corpus, 3).segments
    train(tiny_store, segment, threads=1)
    folder = tiny_store.folder("trajectory", segment.id)
    retention.drop_optimizer(folder, segment.to)
    # As if it came from another machine: other weights, with checksums of their own.
    state = folder.state(segment.to)
    facts = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps(facts | {"fingerprint_details": {}}))
    (state / "manifest.json").write_text('{"droppable": ["optimizer"]}')
    files.write_manifest(state)
    assert train(tiny_store, segment, optimizer=True) == "done"
    assert folder.trainable(segment.to)
    assert list(folder.last_attempt().path.glob("damaged-*")), "the other one is there to be looked at"


def test_an_optimizer_that_a_study_forks_is_not_dropped(tiny_store, tiny_corpus):
    (segment,) = chain(tiny_corpus, 2).segments
    train(tiny_store, segment)
    folder = tiny_store.folder("trajectory", segment.id)
    folder.pin(segment.to, optimizer=True)
    assert folder.pins() == [segment.to]
    assert not retention.drop_optimizer(folder, segment.to)
    assert folder.trainable(segment.to)
