"""What a job makes of its unit over its starts: which stages it runs, tries again, leaves alone, and what it says of them."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.study.launch.tree import Tree
from zexp.store import files
from zexp.store.lease import LeaseTimes
from zexp.study.launch.base import Stage
from zexp.study.launch.slurm import cluster, submission
from zexp.study.launch.slurm.job import TOLD_BY, _Ended, _Job
from zexp.study.stages import stage_folder

# What a stage's process does at each of its tries: publish its result, raise, or be told to stop.
Plays = dict[str, list[str]]


class Cluster:
    """One job, started as often as it asks for."""

    def __init__(self, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tree = tree
        self.submission = submission.new(tree.store, "study")
        self.requeues = 0
        self.cancelled: list[str] = []
        self.ran: list[str] = []
        self.plays: Plays = {}
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
        monkeypatch.setattr(cluster, "requeue", self._requeue)
        self.queued = cluster.Queued("RUNNING", "None")
        monkeypatch.setattr(cluster, "job", lambda id: self.queued)
        monkeypatch.setattr(cluster, "cancel", self.cancelled.extend)
        monkeypatch.setattr(_Job, "_run", lambda job, request: self._run(job, request))
        arrays = [{"units": [0], "shape": "1 node", "job": "7"}, {"units": [1], "shape": "1 node", "job": "8"}]
        record = {"study": "study", "name": "zexp-study", "uid": 0, "cluster": "here", "units": {"0": [], "1": []}, "arrays": arrays}
        files.write_json(self.submission.folder / submission.RECORD, record)

    def unit(self, *stages: Stage, **options: Any) -> None:
        """What submit.py writes."""
        parents = {stage.id: stage for stage in self.tree.stages}
        files.write_json(
            self.submission.unit(0),
            {
                "store": str(self.tree.store.root),
                "lease_times": dataclasses.asdict(LeaseTimes()),
                "gate": None,
                "retries": 0,
                "max_failures": None,
                "failed_before": 0,
                "max_fruitless": 3,
                "max_parallel": None,
                "grace_seconds": 5.0,
                "preload": [],
                "tasks": 1,
                "handlers": {},
                "stages": [
                    {
                        "request": stage.full_request(),
                        "parents": [
                            {"label": parents[id].label, "sure": False, **parents[id].full_request()} for id in stage.parents
                        ],
                    }
                    for stage in stages
                ],
            }
            | options,
        )

    def start(self) -> int:
        """One start; its exit code."""
        return _Job(self.submission.unit(0)).run()

    def run(self, starts: int = 10) -> int:
        """Started again for as long as it is requeued; the last exit code."""
        for _ in range(starts):
            before, code = self.requeues, self.start()
            if self.requeues == before:
                return code
        raise AssertionError("it is requeued for ever")

    def word(self, stage: str) -> Any:
        found = self.submission.said(0, stage)
        return None if found is None else (found["result"], found["error"])

    def _requeue(self, id: str) -> None:
        self.requeues += 1

    def _run(self, job: _Job, request: dict[str, Any]) -> _Ended:
        stage = request["stage"]
        self.ran.append(stage)
        act = self.plays[stage].pop(0)
        if act == "done":
            with stage_folder(self.tree.store, request).attempt({}) as attempt:
                attempt.publish(attempt.scratch("result"), "result")
            return _Ended("done")
        if act == "told":
            job.told = "SIGUSR2"
            return _Ended("interrupted")
        return _Ended("failed", act)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    tree = Tree(tmp_path / "store")
    tree.store = dataclasses.replace(tree.store, patience=0.0)
    return tree


@pytest.fixture
def job(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    before = {number: signal.getsignal(number) for number in (*TOLD_BY, signal.SIGCONT)}
    monkeypatch.setattr("zexp.study.launch.slurm.job.Store", lambda root: tree.store)
    yield Cluster(tree, monkeypatch)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_stage_that_has_failed_is_not_run_again_when_another_one_of_its_job_is_interrupted(job):
    job.unit(job.tree.add("a"), job.tree.add("b"))
    job.plays = {"a": ["no luck"], "b": ["told", "told", "done"]}
    assert job.run() == 1
    assert job.ran == ["a", "b", "b", "b"]
    assert job.word("a") == ("failed", "no luck") and job.word("b") == ("done", None)


def test_a_job_that_comes_no_further_gives_up_at_the_stage_that_is_stuck(job):
    job.unit(job.tree.add("a"), job.tree.add("b"), job.tree.add("c"))
    job.plays = {"a": ["no luck"], "b": ["told"] * 9, "c": []}
    assert job.run() == 1
    assert job.ran == ["a", *"bbb"]
    assert job.word("a") == ("failed", "no luck")
    result, error = job.word("b")
    assert result == "failed" and "requeued without having come further" in error
    assert job.word("c") == ("skipped", "its job has given up at b")
    folder = stage_folder(job.tree.store, job.tree.stages[1].full_request())
    assert "Given up" in folder.last_attempt().failure()["error"], "also for whoever reads the store alone"


def test_tries_are_counted_over_all_starts(job):
    job.unit(job.tree.add("a"), retries=2)
    job.plays = {"a": ["one", "told", "two", "three"]}
    assert job.run() == 1
    assert job.word("a") == ("failed", "three") and job.plays["a"] == []


def test_a_try_that_is_not_the_last_is_not_final(job):
    job.unit(job.tree.add("a"), retries=1)
    job.plays = {"a": ["one", "told"]}
    job.start()
    said = job.submission.said(0, "a")
    assert (said["error"], said["tries"], said["final"]) == ("one", 1, False)


@pytest.mark.parametrize(("reason", "back"), [("None", 0), ("TimeLimit", 1)])
def test_a_job_that_is_ending_goes_back_into_the_queue_only_if_its_time_was_over(job, reason, back):
    """JobState is COMPLETING after scancel and after a time limit of which nobody warned."""
    job.unit(job.tree.add("a"))
    job.plays = {"a": ["told"]}
    job.queued = cluster.Queued("COMPLETING", reason)
    assert job.start() == 1 - back and job.requeues == back


def test_a_child_waits_in_the_queue_while_somebody_has_its_parent_in_hand(job):
    parent, child = job.tree.add("a"), job.tree.add("b", "a")
    job.unit(child)
    job.plays = {"b": ["done"]}
    attempt = stage_folder(job.tree.store, parent.full_request()).attempt({})
    with attempt:
        for _ in range(5):
            assert job.start() == 0
        assert job.requeues == 5 and job.word("b") is None, "waiting is not fruitless"
        attempt.publish(attempt.scratch("result"), "result")
    assert job.start() == 0 and job.word("b") == ("done", None)


def test_a_child_is_skipped_when_nobody_works_at_its_parent(job):
    job.tree.add("a")
    job.unit(job.tree.add("b", "a"))
    assert job.start() == 1
    assert job.word("b") == ("skipped", "stage a (a) is not done")


def test_failures_of_earlier_batches_count(job):
    job.unit(job.tree.add("a"), job.tree.add("b"), max_failures=3, failed_before=2)
    job.plays = {"a": ["no luck"]}
    assert job.start() == 1
    assert job.word("b") == ("skipped", "stopped after 3 failures (hydra.launcher.max_failures)")
    assert job.cancelled == ["8"]
