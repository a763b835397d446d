"""Several processes that train one segment are one process, but for rounding; and when one of them fails, all end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import zexp
from tests.train import runs
from tests.train.runs import STEP, chain, differing, metrics, tensors, train
from zexp.config.schema import Schedule
from zexp.store.folder import StageFolder, Store
from zexp.train import loop, ranks
from zexp.train.lifeline import RankFailed

REPOSITORY = Path(zexp.__file__).parent.parent

# Layouts differ in the order in which gradients are summed, by some units of 2^-24, and Adam hands such a part of
# lr = 3e-3 on at each step; elements whose gradient is hardly more than rounding may move anyway by more. Eight steps gave 1.2e-5 at
# most (mamba2), as cutting the batch into micro-batches within one process does. Half of each batch gives 1e-2.
WEIGHTS = 1e-4
# Loss and gradient norm (Adam does not see a gradient's scale: the norm does) of sums of fp32 of another order.
FIGURES = 1e-5


def folder_of(store: Store, segment: Any) -> StageFolder:
    return store.folder("trajectory", segment.id)


def logs(store: Store, segment: Any, rank: int) -> str:
    last = folder_of(store, segment).last_attempt()
    assert last is not None
    return (last.path / f"log.rank{rank}").read_text()


def assert_alike(one: Store, other: Store, segment: Any) -> None:
    """Weights, optimizer and figures agree but for rounding."""
    ours, theirs = tensors(one, segment), tensors(other, segment)
    assert ours.keys() == theirs.keys()
    worst = max((ours[name] - theirs[name]).abs().max().item() for name in ours if name.startswith("weights/"))
    assert worst < WEIGHTS, worst
    assert all(ours[name].equal(theirs[name]) for name in ours if name.endswith(".step"))
    for line, expected in zip(metrics(folder_of(one, segment)), metrics(folder_of(other, segment)), strict=True):
        assert (line["step"], line["tokens"], line["lr"]) == (expected["step"], expected["tokens"], expected["lr"])
        for figure in ("loss", "grad_norm"):
            assert line[figure] == pytest.approx(expected[figure], rel=FIGURES), line["step"]


def beside(store: Store, segment: Any, name: str, **changes: Any) -> Store:
    """The same training by one process (or another layout) in a store beside."""
    other = runs.store_beside(store, name)
    assert train(other, segment, log_every=1, **changes) == "done"
    return other


def test_two_ranks_train_what_one_process_does(tiny_store, tiny_corpus):
    (segment,) = chain(tiny_corpus, 8, arch="moe").segments
    assert train(tiny_store, segment, log_every=1, ranks=runs.ranks(2)) == "done"
    assert_alike(tiny_store, beside(tiny_store, segment, "one"), segment)
    facts = json.loads((folder_of(tiny_store, segment).state(segment.to) / "state.json").read_text())
    assert [details["layout"] for details in facts["fingerprint_details"].values()] == ["data 2"]
    assert "Rank 1 of 2, from 0 tokens on cpu." in logs(tiny_store, segment, 1)


@pytest.mark.dist
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("arch", ["transformer", "mamba2", "zamba2", "blackmamba"])
def test_any_layout_gives_the_same_but_for_rounding(tiny_store, tiny_corpus, arch, count):
    (segment,) = chain(tiny_corpus, 8, arch=arch).segments
    # A micro-batch of one: ranks of two sequences cut them, too.
    assert train(tiny_store, segment, log_every=1, micro_batch=1, ranks=runs.ranks(count)) == "done"
    assert_alike(tiny_store, beside(tiny_store, segment, "one", micro_batch=4), segment)


@pytest.mark.dist
def test_a_layout_that_is_repeated_gives_the_same_bits_however_often_it_saves(tiny_store, tiny_corpus):
    (segment,) = chain(tiny_corpus, 8, arch="moe").segments
    often = {"every_seconds": 0, "rolling": 1}
    assert train(tiny_store, segment, log_every=1, ranks=runs.ranks(2), checkpoint=often, keep=[3 * STEP]) == "done"
    other = beside(tiny_store, segment, "again", ranks=runs.ranks(2))
    assert differing(tensors(tiny_store, segment), tensors(other, segment)) == []
    assert folder_of(tiny_store, segment).states() == [3 * STEP, 7 * STEP, 8 * STEP]


@pytest.mark.dist
def test_a_training_goes_on_with_another_number_of_ranks(tiny_store, tiny_corpus):
    whole = chain(tiny_corpus, 6, arch="moe", then=runs.anneal(4, fraction=0.5))
    trunk, fork = whole.segments
    for to, count in ((2 * STEP, 2), (4 * STEP, 1), (6 * STEP, 4)):
        assert train(tiny_store, trunk, to=to, log_every=1, ranks=runs.ranks(count)) == "done"
    assert train(tiny_store, fork, log_every=1, ranks=runs.ranks(2)) == "done"
    other = runs.store_beside(tiny_store, "one")
    for segment in whole.segments:
        assert train(other, segment, log_every=1) == "done"
        assert_alike(tiny_store, other, segment)
    facts = json.loads((folder_of(tiny_store, fork).state(fork.to) / "state.json").read_text())
    layouts = [facts["fingerprint_details"][part["fingerprint"]]["layout"] for part in facts["fingerprints"]]
    assert layouts == ["data 2", "one process", "data 4", "data 2"]


# Stopping


def train_and(disturb: Any, store: Store, segment: Any, count: int, **changes: Any) -> Any:
    """Train with `count` ranks and call disturb(rank -> pid) after a few steps; the outcome, or what was raised.

    Long enough that the disturbance comes in time: the steps that are too many are never made.
    """
    folder, pids = runs.create(store, segment), {}

    def watch() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            last = folder.last_attempt()
            if last is not None and len(last.metrics()) >= 3:
                pids.update({rank: child.pid for rank, child in started.items()})
                pids["at"] = time.monotonic()
                disturb(pids)
                return
            time.sleep(0.01)

    started: dict[int, subprocess.Popen[bytes]] = {}
    real = ranks._start

    def start(rank: int, *args: Any) -> subprocess.Popen[bytes]:
        started[rank] = real(rank, *args)
        return started[rank]

    ranks._start = start
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return train(store, segment, log_every=1, ranks=runs.ranks(count), **changes), pids
    except RankFailed as error:
        return error, pids
    finally:
        ranks._start = real
        watcher.join()
        assert all(child.poll() is not None for child in started.values()), "no rank is left behind"


LONG = 3000  # steps


@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_one_rank_stops_all_at_one_step(tiny_store, tiny_corpus, number):
    (segment,) = chain(tiny_corpus, LONG).segments
    outcome, _ = train_and(lambda pids: os.kill(pids[1], number), tiny_store, segment, 2)
    assert outcome == "interrupted"
    folder = folder_of(tiny_store, segment)
    (at,) = folder.states()
    assert folder.last_attempt().failure() is None
    text = f"{signal.Signals(number).name} to rank 1: stopped at {at} tokens, to be resumed."
    assert text in folder.last_attempt().log.read_text() and text in logs(tiny_store, segment, 1)

    assert train(tiny_store, segment, to=at + 4 * STEP, ranks=runs.ranks(2)) == "done"
    other = runs.store_beside(tiny_store, "undisturbed")
    assert train(other, segment, to=at + 4 * STEP, ranks=runs.ranks(2)) == "done"
    assert differing(tensors(tiny_store, segment, at + 4 * STEP), tensors(other, segment, at + 4 * STEP)) == []


@pytest.mark.dist
@pytest.mark.parametrize(("victim", "count"), [(1, 2), (2, 4)])  # of four, some rank has no connection to the victim
def test_a_killed_rank_ends_the_stage_within_seconds(tiny_store, tiny_corpus, victim, count):
    (segment,) = chain(tiny_corpus, LONG).segments
    error, pids = train_and(lambda pids: os.kill(pids[victim], signal.SIGKILL), tiny_store, segment, count)
    assert time.monotonic() - pids["at"] < 10
    assert isinstance(error, RankFailed)
    failure = folder_of(tiny_store, segment).last_attempt().failure()
    assert f"Rank {victim} (process {pids[victim]} on {socket.gethostname()}) ended without a word" in failure["error"]
    assert "ended by SIGKILL, by hand or because memory ran out" in failure["error"]
    assert f"log.rank{victim} ends with:" in failure["error"]
    assert folder_of(tiny_store, segment).states() == []
    assert train(tiny_store, segment, to=2 * STEP) == "done", "the lease was given back"


@pytest.mark.dist
def test_all_ranks_see_a_divergence(tiny_store, tiny_corpus):
    (segment,) = chain(tiny_corpus, 40, schedule=Schedule(kind="constant", peak_lr=10.0)).segments
    bound = {"divergence": {"margin": 2.0, "steps": 4}}
    assert train(tiny_store, segment, log_every=1, ranks=runs.ranks(2), **bound) == "diverged"
    found = folder_of(tiny_store, segment).diverged()
    assert f"Diverged at {found['tokens']} tokens" in logs(tiny_store, segment, 1)
    other = runs.store_beside(tiny_store, "one")
    assert train(other, segment, **bound) == "diverged"
    assert folder_of(other, segment).diverged()["tokens"] == found["tokens"]


@pytest.mark.dist
def test_a_rank_that_cannot_start_is_said(tiny_store, tiny_corpus, monkeypatch):
    (segment,) = chain(tiny_corpus, 8).segments
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RankFailed, match=r"Rank 1 ended before it had begun: exit status 1"):
        train(tiny_store, segment, ranks=runs.ranks(2))


@pytest.mark.dist
def test_an_error_of_rank_0_ends_the_others(tiny_store, tiny_corpus, monkeypatch):
    (segment,) = chain(tiny_corpus, 8).segments
    good, calls = loop.backward, []

    def breaks_at_the_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("No space left on device")
        return good(*args, **kwargs)

    monkeypatch.setattr(loop, "backward", breaks_at_the_third)
    began = time.monotonic()
    with pytest.raises(OSError, match="No space left"):
        train(tiny_store, segment, ranks=runs.ranks(2))
    assert time.monotonic() - began < 20
    assert "Rank 0 says that the stage ended: failed." in logs(tiny_store, segment, 1)


# As a launcher starts them: every rank is a task of its own


class Job:
    """Tasks that run one stage, with the variables of torchrun or of SLURM."""

    def __init__(self, store: Store, segment: Any, slurm: bool = False, mishap: str = "", **changes: Any) -> None:
        folder = runs.create(store, segment)
        stage = {"stage": "s", "kind": "segment", "folder": f"trajectory/{folder.path.name}"}
        asked = json.dumps({**runs.request(segment.to), "ranks": runs.ranks(2), **stage, **changes})
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = str(probe.getsockname()[1])
        self.tasks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.train.rank_worker", str(store.root), asked, mishap],
                env=os.environ | {"PYTHONPATH": str(REPOSITORY), "MASTER_PORT": port} | self._variables(rank, slurm),
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]

    def _variables(self, rank: int, slurm: bool) -> dict[str, str]:
        if slurm:
            return {
                "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(rank), "SLURM_JOB_ID": "4711",
                "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_NODELIST": "other[1-9]",
            }  # fmt: skip
        return {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost"}

    def ended(self, seconds: float = 60.0) -> list[tuple[int, str]]:
        """Exit code and last word of each task."""
        try:
            said = [task.communicate(timeout=seconds)[0].strip() for task in self.tasks]
        finally:
            for task in self.tasks:
                task.kill()
                task.wait()
        return [(task.returncode, text) for task, text in zip(self.tasks, said, strict=True)]


@pytest.mark.dist
@pytest.mark.parametrize("slurm", [False, True])
def test_the_tasks_of_a_job_train_and_know_that_it_is_done(tiny_store, tiny_corpus, slurm):
    (segment,) = chain(tiny_corpus, 8).segments
    assert Job(tiny_store, segment, slurm=slurm, log_every=1).ended() == [(0, "done"), (0, "done")]
    assert_alike(tiny_store, beside(tiny_store, segment, "one"), segment)
    assert Job(tiny_store, segment, slurm=slurm).ended() == [(0, "done"), (0, "done")], "nothing was left to train"
    assert len(folder_of(tiny_store, segment).attempts()) == 1


@pytest.mark.dist
def test_torchrun_starts_them_too(tiny_store, tiny_corpus):
    (segment,) = chain(tiny_corpus, 4).segments
    folder = runs.create(tiny_store, segment)
    asked = {**runs.request(segment.to), "ranks": runs.ranks(2), "stage": "s", "kind": "segment"}
    asked |= {"folder": f"trajectory/{folder.path.name}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.train.rank_worker", str(tiny_store.root), json.dumps(asked)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["done", "done"]
    assert folder.states() == [segment.to]


@pytest.mark.dist
def test_the_error_of_another_rank_is_the_stages(tiny_store, tiny_corpus):
    (segment,) = chain(tiny_corpus, 8).segments
    (zero, said), (one, _) = Job(tiny_store, segment, mishap="raise").ended()
    assert (zero, one) == (0, 1) and said.startswith("failed zexp.train.lifeline.RankFailed: Rank 1 (")
    failure = folder_of(tiny_store, segment).last_attempt().failure()
    assert "failed: torch.OutOfMemoryError: no room for the third step" in failure["error"]
    assert "tests/train/rank_worker.py" in failure["traceback"]
    assert "OutOfMemoryError" in logs(tiny_store, segment, 1)


@pytest.mark.dist
def test_when_rank_0_is_killed_the_others_end_within_seconds(tiny_store, tiny_corpus):
    (segment,) = chain(tiny_corpus, LONG).segments
    job = Job(tiny_store, segment, log_every=1)
    folder = folder_of(tiny_store, segment)
    until = time.monotonic() + 60
    while not (folder.last_attempt() and len(folder.last_attempt().metrics()) > 3) and time.monotonic() < until:
        time.sleep(0.01)
    job.tasks[0].kill()
    killed = time.monotonic()
    assert [code for code, _ in job.ended(20)] == [-9, 1]
    assert time.monotonic() - killed < 10


@pytest.mark.dist
def test_a_rank_that_hangs_ends_the_stage_after_the_timeout(tiny_store, tiny_corpus):
    (segment,) = chain(tiny_corpus, 8).segments
    (zero, said), _ = Job(tiny_store, segment, mishap="hang", ranks=runs.ranks(2, seconds=8.0)).ended()
    assert zero == 0 and "one may hang, be slower than parallelism.timeout_seconds = 8" in said


@pytest.mark.dist
@pytest.mark.parametrize(
    ("mishap", "says"),
    [
        ("other kind", "The ranks of one training must be of one kind: cpu_capability is AVX9 here and"),
        ("drift", "The ranks have drifted apart: 1 of 8 tensors differ, the first is norm.weight. No state was written."),
    ],
)
def test_ranks_that_would_not_stay_equal_are_refused(tiny_store, tiny_corpus, mishap, says):
    (segment,) = chain(tiny_corpus, 8).segments
    (_, said), _ = Job(tiny_store, segment, mishap=mishap).ended()
    assert said.startswith("failed") and says in said
    assert folder_of(tiny_store, segment).states() == []


@pytest.mark.dist
def test_a_job_of_another_number_of_tasks_is_refused(tiny_store, tiny_corpus):
    (segment,) = chain(tiny_corpus, 8).segments
    job = Job(tiny_store, segment, ranks=runs.ranks(4))
    errors = [task.communicate(timeout=60)[1] for task in job.tasks]
    assert all("stage s is for 4 ranks, and this job has 2" in error for error in errors)
