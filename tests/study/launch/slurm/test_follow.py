"""What the following command makes of what the scheduler says, with a scheduler that says what the test wants."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.study.launch.tree import Tree
from zexp.store import files
from zexp.store.folder import StageFolder, Store
from zexp.study.launch import Outcome
from zexp.study.launch.slurm import cluster, lookup, submission
from zexp.study.launch.slurm.cluster import Queued
from zexp.study.launch.slurm.follow import Follow
from zexp.study.launch.slurm.options import SlurmOptions
from zexp.study.stages import stage_folder

Answer = dict[str, Queued] | None


class Scheduler:
    """Answers of squeue one after the other, the last for ever, and of sacct; how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *queue: Answer, sacct: Answer = None) -> None:
        self.queue, self.sacct, self.asked, self.cancelled = list(queue), sacct, 0, []
        monkeypatch.setattr(cluster, "queue", lambda names: self._answer(self.queue[0] if len(self.queue) == 1 else self.queue.pop(0)))
        monkeypatch.setattr(cluster, "ended", lambda ids: self._answer(self.sacct))
        monkeypatch.setattr(cluster, "cancel", self.cancelled.extend)
        monkeypatch.setattr(cluster, "name", lambda: "here")

    def _answer(self, answer: Answer) -> Answer:
        self.asked += 1
        return answer


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    tree = Tree(tmp_path / "store")
    tree.store = dataclasses.replace(tree.store, patience=0.0)
    return tree


def submitted(tree: Tree, *, seen: bool = True) -> submission.Submission:
    """A submission with a job for each stage: 7_0, 7_1, …"""
    one = submission.new(tree.store, "study")
    units = {str(n): [stage.id] for n, stage in enumerate(tree.stages)}
    units |= {"99": []}  # so that there is an array
    array = {"units": [int(n) for n in units], "shape": "1 node", "job": "7"}
    record = {"study": "study", "name": "zexp-study", "uid": os.getuid(), "cluster": "here"}
    files.write_json(one.folder / submission.RECORD, {**record, "units": units, "arrays": [array]})
    if seen:
        files.write_json(one.unit(0).with_suffix(".seen.json"), {})
    return one


def follow(tree: Tree, one: submission.Submission, *, act: Callable[[], None] = lambda: None, **options: Any) -> dict[str, Outcome]:
    chosen = SlurmOptions(**{"poll_seconds": 0.01, "visible_seconds": 0.05, **options})

    def hear(event: Any) -> None:
        tree.events.append(event)
        if event.kind == "tick":
            act()

    return Follow(tree.stages, tree.store, chosen, hear, "study", [one]).run()


def job(state: str, reason: str = "") -> Queued:
    return Queued(state, reason, "node3")


@pytest.mark.parametrize(
    ("queued", "status", "words"),
    [
        (job("OUT_OF_MEMORY"), "failed", "job 7_0 ran out of memory on node3: raise hydra.launcher.mem_gb"),
        (job("NODE_FAIL"), "interrupted", "the node node3 of job 7_0 failed"),
        (job("CANCELLED"), "interrupted", "job 7_0 was cancelled"),
        (job("TIMEOUT"), "interrupted", "reached its time limit"),
        (job("PREEMPTED"), "interrupted", "was preempted"),
        (job("COMPLETED"), "failed", "ended, but its result is not in the store"),
        (job("FAILED", "NonZeroExitCode"), "failed", "job 7_0 ended as FAILED (NonZeroExitCode)"),
        (job("CANCELLED", "DependencyNeverSatisfied"), "skipped", "a stage that it needs"),
    ],
)
def test_the_end_of_a_job_explains_a_stage_that_is_not_there(tree, monkeypatch, queued, status, words):
    tree.add("a")
    tree.add("b", "a")
    one = submitted(tree)
    Scheduler(monkeypatch, {"7_0": queued, "7_1": job("PENDING", "Dependency")})
    outcomes = follow(tree, one)
    assert outcomes["a"].status == status and words in outcomes["a"].error
    assert outcomes["b"].status == "skipped"
    assert lookup.read_notes(one)["7_0"] == queued, "kept, because the scheduler forgets"


def test_a_failure_that_the_stage_could_not_write_down_is_written_into_its_attempt(tree, monkeypatch):
    stage = tree.add("a")
    folder = stage_folder(tree.store, stage.full_request())
    one = submitted(tree)
    Scheduler(monkeypatch, {"7_0": job("RUNNING")}, {"7_0": job("RUNNING")}, {"7_0": job("OUT_OF_MEMORY")})
    made: list[Any] = []

    def begin() -> None:
        if not made:
            made.append(folder.attempt({}))
            with made[0]:
                pass  # its process is gone, and has written no reason

    follow(tree, one, act=begin)
    assert "ran out of memory" in folder.last_attempt().failure()["error"]


def test_what_is_in_the_store_is_done_whatever_the_scheduler_says(tree, monkeypatch):
    stage = tree.add("a")
    attempt = stage_folder(tree.store, stage.full_request()).attempt({})
    with attempt:
        attempt.publish(attempt.scratch("result"), "result")
    Scheduler(monkeypatch, {"7_0": job("FAILED")})
    assert follow(tree, submitted(tree))["a"].status == "done"


def test_a_controller_that_is_away_ends_nothing(tree, monkeypatch):
    stage = tree.add("a")
    folder = stage_folder(tree.store, stage.full_request())
    scheduler = Scheduler(monkeypatch, None)
    turns = 0

    def publish() -> None:
        nonlocal turns
        turns += 1
        if turns == 4:
            attempt = folder.attempt({})
            with attempt:
                attempt.publish(attempt.scratch("result"), "result")

    assert follow(tree, submitted(tree), act=publish)["a"].status == "done"
    assert scheduler.asked >= 4
    assert [event.text for event in tree.events if event.kind == "slot"] == [
        "The scheduler does not answer. The jobs go on; the store tells how far they are."
    ]


def test_a_job_that_is_requeued_shows_an_end_for_a_moment_only(tree, monkeypatch):
    tree.add("a")
    answers = [{"7_0": job("NODE_FAIL")}, {"7_0": job("PENDING", "BeginTime")}, {"7_0": job("CANCELLED")}]
    Scheduler(monkeypatch, *answers)
    assert "was cancelled" in follow(tree, submitted(tree))["a"].error


def test_squeue_forgets_and_sacct_tells_one_question_a_poll(tree, monkeypatch):
    tree.add("a")
    scheduler = Scheduler(monkeypatch, {}, sacct={"7_0": job("TIMEOUT")})
    assert "time limit" in follow(tree, submitted(tree))["a"].error
    polls = sum(event.kind == "tick" for event in tree.events) + 1
    assert scheduler.asked <= polls


def test_a_job_that_nobody_knows_is_lost_after_some_looks(tree, monkeypatch):
    tree.add("a")
    Scheduler(monkeypatch, {}, sacct={})
    outcome = follow(tree, submitted(tree))["a"]
    assert (outcome.status, outcome.error) == ("interrupted", "job 7_0 is known neither to squeue nor to sacct")


@pytest.mark.parametrize("state", ["FAILED", "RUNNING"])
def test_jobs_that_leave_no_trace_do_not_see_the_store_and_the_rest_is_cancelled(tree, monkeypatch, state):
    tree.add("a")
    tree.add("b", "a")
    scheduler = Scheduler(monkeypatch, {"7_0": job(state), "7_1": job("PENDING")})
    outcomes = follow(tree, submitted(tree, seen=False))
    assert "do not see the store" in outcomes["a"].error and "7_1" in scheduler.cancelled


def test_a_job_that_says_it_failed_is_believed_at_once_and_its_retries_are_shown(tree, monkeypatch):
    tree.add("a")
    one = submitted(tree)
    Scheduler(monkeypatch, {"7_0": job("RUNNING")})
    told = iter([1, 2])

    def say() -> None:
        said = {"result": "failed", "error": "no luck", "attempt": None, "tries": (tries := next(told)), "final": tries > 1}
        files.write_json(one.unit(0).with_suffix(".ended.json"), {"start": 1, "stages": {"a": said}})

    outcome = follow(tree, one, act=say, retries=1)["a"]
    assert (outcome.status, outcome.error, outcome.tries) == ("failed", "no luck", 2)
    assert [event.kind for event in tree.events if event.kind == "retry"] == ["retry"]


def test_a_stopped_study_says_why_its_jobs_were_cancelled(tree, monkeypatch):
    tree.add("a")
    one = submitted(tree)
    files.write_json(one.folder / submission.STOPPED, {"reason": "stopped after 1 failure (hydra.launcher.max_failures)"})
    Scheduler(monkeypatch, {"7": job("CANCELLED")})
    assert follow(tree, one)["a"].error == "stopped after 1 failure (hydra.launcher.max_failures)"


def test_ctrl_c_leaves_the_jobs_alone(tree, monkeypatch):
    tree.add("a")

    def interrupt() -> None:
        raise KeyboardInterrupt

    scheduler = Scheduler(monkeypatch, {"7_0": job("RUNNING")})
    assert follow(tree, submitted(tree), act=interrupt)["a"].status == "submitted"
    assert not scheduler.cancelled
    assert any("zexp cancel study" in event.text for event in tree.events if event.kind == "stopping")


def test_submissions_without_jobs_are_not_asked_about_again(tree, monkeypatch):
    tree.add("a")
    one = submitted(tree)
    scheduler = Scheduler(monkeypatch, {"7_0": job("CANCELLED"), "7_1": job("COMPLETED")})
    follow(tree, one)
    asked = scheduler.asked
    jobs, silent = lookup.jobs_of(Store(tree.store.root), ["study"])
    assert scheduler.asked == asked and not silent
    assert jobs["study"]["a"].line() == "job 7_0 CANCELLED"


def test_a_look_while_it_is_submitted_does_not_close_a_submission(tree, monkeypatch):
    tree.add("a")
    one = submitted(tree)
    record = one.record()
    files.write_json(one.folder / submission.RECORD, {**record, "arrays": [{**record["arrays"][0], "job": None}]})
    Scheduler(monkeypatch, {})
    lookup.jobs_of(tree.store, ["study"])
    assert not one.over, "its sbatch is still running"
    files.write_json(one.folder / submission.RECORD, record)
    lookup.jobs_of(tree.store, ["study"])
    assert not one.over, "squeue was asked before it was recorded, or hides it"


def test_a_job_that_has_vanished_says_nothing_about_those_that_wait(tree, monkeypatch):
    """The accounting is asked about the one alone."""
    tree.add("a")
    tree.add("b")
    folder = stage_folder(tree.store, tree.stages[1].full_request())
    Scheduler(monkeypatch, {"7_1": job("PENDING", "Priority")}, sacct=None)
    turns = 0

    def publish() -> None:
        nonlocal turns
        turns += 1
        if turns == 40:
            with folder.attempt({}) as attempt:
                attempt.publish(attempt.scratch("result"), "result")

    outcomes = follow(tree, submitted(tree), act=publish)
    assert outcomes["a"].error == "job 7_0 is known neither to squeue nor to sacct"
    assert outcomes["b"].status == "done"


def on_another_machine(folder: StageFolder, *, silent: float) -> None:
    """The lease of a process that has died on a machine of which this one knows nothing."""
    attempt = folder.attempt({})
    held = folder.path / f"lease.{attempt.n}"
    facts = {**json.loads(held.read_text()), "host": "node3", "boot": "another", "released": False}
    held.write_text(json.dumps(facts))
    os.utime(held, (time.time() - silent,) * 2)


def test_a_process_that_died_with_its_node_holds_nobody_up(tree, monkeypatch):
    stage = tree.add("a")
    folder = stage_folder(tree.store, stage.full_request())
    one = submitted(tree)
    Scheduler(monkeypatch, {"7_0": job("RUNNING")}, {"7_0": job("RUNNING")}, {}, sacct={})
    began: list[None] = []

    def begin() -> None:
        if not began:
            began.append(on_another_machine(folder, silent=4 * tree.store.lease_times.timeout + 1))

    assert "known neither" in follow(tree, one, act=begin)["a"].error
    assert folder.holder() is None


def test_the_reason_of_a_job_that_is_over_is_written_down_although_its_lease_still_looks_alive(tree, monkeypatch):
    stage = tree.add("a")
    folder = stage_folder(tree.store, stage.full_request())
    one = submitted(tree)
    files.write_json(one.unit(0).with_suffix(".seen.json"), {"host": "node3"})
    Scheduler(monkeypatch, {"7_0": job("RUNNING")}, {"7_0": job("RUNNING")}, {"7_0": job("OUT_OF_MEMORY")})
    began: list[None] = []

    def begin() -> None:
        if not began:
            began.append(on_another_machine(folder, silent=0))

    follow(tree, one, act=begin)
    assert "ran out of memory" in folder.last_attempt().failure()["error"] and folder.holder() is not None


def test_jobs_that_die_as_a_whole_count_as_failures(tree, monkeypatch):
    tree.add("a")
    tree.add("b")
    one = submitted(tree)
    scheduler = Scheduler(monkeypatch, {"7_0": job("OUT_OF_MEMORY"), "7_1": job("RUNNING")}, {"7_0": job("OUT_OF_MEMORY"), "7_1": job("RUNNING")}, {"7_0": job("OUT_OF_MEMORY"), "7_1": job("CANCELLED")})
    outcomes = follow(tree, one, max_failures=1)
    assert scheduler.cancelled == ["7_1"]
    assert (outcomes["b"].status, outcomes["b"].error) == ("skipped", "stopped after 1 failure (hydra.launcher.max_failures)")


def test_a_submission_is_only_closed_where_its_jobs_are(tree, monkeypatch):
    tree.add("a")
    one = submitted(tree)
    os.utime(one.folder / submission.RECORD, (0, 0))
    Scheduler(monkeypatch, {})
    monkeypatch.setattr(cluster, "name", lambda: "another")
    lookup.jobs_of(tree.store, ["study"])
    assert not one.over
    monkeypatch.setattr(cluster, "name", lambda: "here")
    lookup.jobs_of(tree.store, ["study"])
    assert one.over


def test_where_nobody_followed_the_accounting_tells_how_a_job_ended(tree, monkeypatch):
    tree.add("a")
    one = submitted(tree)
    Scheduler(monkeypatch, {"7_1": job("RUNNING")}, sacct={"7_0": job("OUT_OF_MEMORY")})
    jobs, _ = lookup.jobs_of(tree.store, ["study"])
    assert jobs["study"]["a"].line() == "job 7_0 OUT_OF_MEMORY" and lookup.read_notes(one)["7_0"].over


def test_somebody_elses_submission_is_never_closed(tree, monkeypatch):
    tree.add("a")
    one = submitted(tree)
    files.write_json(one.folder / submission.RECORD, {**one.record(), "uid": os.getuid() + 1})
    Scheduler(monkeypatch, {"7_0": job("COMPLETED"), "7_1": job("COMPLETED")})
    lookup.jobs_of(tree.store, ["study"])
    assert not one.over
