"""Watching the jobs of a study until each of its stages has ended. Ends by Ctrl-C without touching a job.

The store says what is done; what the scheduler says is a hint, used to explain what is not. One question to the scheduler a
poll for all jobs together: squeue, or sacct where squeue has forgotten a job.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zexp.config.errors import ConfigError
from zexp.store.attempt import AttemptRecord
from zexp.store.folder import StageFolder, Store
from zexp.study.launch import detach, ended
from zexp.study.launch.base import Event, OnEvent, Outcome, Stage, Status, stopped_after
from zexp.study.launch.slurm import cluster, lookup
from zexp.study.launch.slurm.cluster import Queued
from zexp.study.launch.slurm.options import SlurmOptions
from zexp.study.launch.slurm.submission import Submission
from zexp.study.stages import divergence, is_done, stage_folder

TICK_SECONDS = 0.5
SURE_POLLS = 2  # a job counts as over when it was so at so many looks in a row: requeued ones show an end for a moment
LOST_POLLS = 3  # … and as unknown, when neither squeue nor sacct knew it
# What a job's end says about a stage that is not in the store, where the job itself said nothing.
WHY: dict[str, tuple[Status, str]] = {
    "CANCELLED": ("interrupted", "job {id} was cancelled (scancel)"),
    "TIMEOUT": ("interrupted", "job {id} reached its time limit before it had written a state (hydra.launcher.signal_delay_s)"),
    "NODE_FAIL": ("interrupted", "the node {node} of job {id} failed, and the cluster does not requeue it"),
    "BOOT_FAIL": ("interrupted", "the node of job {id} did not start"),
    "PREEMPTED": ("interrupted", "job {id} was preempted, and the cluster does not requeue it"),
    "DEADLINE": ("interrupted", "job {id} was ended by its deadline"),
    "OUT_OF_MEMORY": ("failed", "job {id} ran out of memory on {node}: raise hydra.launcher.mem_gb, or lower execution.micro_batch"),
}


@dataclass
class _Watched:
    """What is known of a stage that has not ended. jobs: submission, unit and job id, the newest last."""

    stage: Stage
    folder: StageFolder
    jobs: list[tuple[Submission, int, str]]
    attempts: int  # those that were there before
    began: float = 0.0
    attempt: Path | None = None
    over: int = 0  # looks in a row at which its job was over
    unknown: int = 0  # … at which nobody knew its job
    told: int = 0  # failed tries of which the display knows


@dataclass
class Follow:
    """See run()."""

    stages: Sequence[Stage]
    store: Store
    options: SlurmOptions
    on_event: OnEvent
    study: str
    submissions: Sequence[Submission]
    failed_before: int = 0  # stages of the study that have failed in an earlier launch
    _outcomes: dict[str, Outcome] = field(default_factory=dict)
    _watched: dict[str, _Watched] = field(default_factory=dict)
    _queued: dict[str, Queued] = field(default_factory=dict)
    _silent_since: float | None = None  # the scheduler answers no more
    _traceless_since: float | None = None
    _seen: bool = False  # a job has left a trace in the store
    _ask_sacct: list[str] = field(default_factory=list)
    _known: set[str] = field(default_factory=set)  # the jobs of the last answer
    _asked: set[str] | None = None  # the jobs that it was about; None = all

    def run(self) -> dict[str, Outcome]:
        """How each stage ended; `submitted` for what Ctrl-C left in the queue."""
        self._begin()
        try:
            while len(self._outcomes) < len(self.stages):
                self._poll()
                until = time.monotonic() + self.options.poll_seconds
                while len(self._outcomes) < len(self.stages) and time.monotonic() < until:
                    self.on_event(Event(kind="tick", text=self._queue_text()))
                    time.sleep(TICK_SECONDS)
        except KeyboardInterrupt:
            self.on_event(Event(kind="stopping", text=come_back(self.store, self.study)))
            for stage in self.stages:
                self._outcomes.setdefault(stage.id, Outcome(status="submitted"))
        else:
            for sent in self.submissions:
                sent.end_if_over(lookup.read_notes(sent) | self._queued)
        return {stage.id: self._outcomes[stage.id] for stage in self.stages}

    def _begin(self) -> None:
        jobs: dict[str, list[tuple[Submission, int, str]]] = {}
        for sent in self.submissions:
            stages = sent.jobs()
            for id, unit in sent.units().items():
                for stage in stages[id]:
                    jobs.setdefault(stage, []).append((sent, unit, id))
        for one in self.stages:
            folder = stage_folder(self.store, one.full_request())
            last = folder.last_attempt()
            self._watched[one.id] = _Watched(one, folder, jobs.get(one.id, []), 0 if last is None else last.n)

    # One look

    def _poll(self) -> None:
        asked = self._ask()
        for one in list(self._watched.values()):
            if one.stage.id not in self._outcomes:
                self._look(one, asked)
        if self._is_blind():
            self._give_up()

    def _ask(self) -> bool:
        """One question to the scheduler; True if it answered."""
        about, self._ask_sacct = self._ask_sacct, []
        self._asked = set(about) or None
        found = cluster.ended(about) if about else cluster.queue({sent.name for sent in self.submissions})
        now = time.monotonic()
        self._known = set()
        if found is None and about:  # many clusters keep no accounting
            found = {}
        if found is None:
            if self._silent_since is None:
                self._silent_since = now
                self.on_event(Event(kind="slot", text="The scheduler does not answer. The jobs go on; the store tells how far they are."))
            return False
        if self._silent_since is not None:
            self._silent_since = None
            self.on_event(Event(kind="slot", text="The scheduler answers again."))
        for sent in self.submissions:
            said = cluster.about(sent.jobs(), found)
            lookup.note(sent, said)
            self._queued |= said
            self._known |= said.keys()
        return True

    def _look(self, one: _Watched, asked: bool) -> None:
        request = one.stage.full_request()
        if is_done(one.folder, request):
            self._settle(one, "done", None)
            return
        self._look_at_attempt(one)
        said = self._said(one)
        if said is not None and self._job_spoke(one, said):
            return
        if asked:
            self._job_over(one)

    def _look_at_attempt(self, one: _Watched) -> None:
        last = one.folder.last_attempt()
        if last is None or last.n <= one.attempts or last.path == one.attempt:
            return
        if last.failure() is None and one.folder.holder() is not None:
            one.attempt, one.began = last.path, time.monotonic()
            self.on_event(Event(kind="started", stage=one.stage, attempt=last.path))

    def _said(self, one: _Watched) -> dict[str, Any] | None:
        """What the stage's newest job said of it."""
        if not one.jobs:
            return None
        sent, unit, _ = one.jobs[-1]
        return sent.said(unit, one.stage.id)

    def _job_spoke(self, one: _Watched, said: Mapping[str, Any]) -> bool:
        """Take what a job says of a stage that is not in the store; True if that is its end."""
        result, tries = said["result"], said["tries"]
        if said["attempt"] is not None:
            one.attempt = Path(said["attempt"])
        if not said["final"]:
            if tries > one.told:
                one.told = tries
                outcome = self._outcome(one, "failed", said["error"], tries)
                self.on_event(Event(kind="retry", stage=one.stage, attempt=one.attempt, outcome=outcome))
            return False
        if result in ("failed", "diverged", "skipped"):
            self._settle(one, result, said["error"], tries)
            return True
        return False

    def _job_over(self, one: _Watched) -> None:
        """Explain a stage whose jobs are over, or that nobody knows any more."""
        if (reason := divergence(one.folder, one.stage.full_request())) is not None and not one.jobs:
            self._settle(one, "diverged", reason)
            return
        if not one.jobs:
            self._settle(one, "interrupted", "no job of it is in the queue")
            return
        sent, unit, id = one.jobs[-1]
        if self._asked is not None and id not in self._asked:
            return
        found = self._queued.get(id)
        if found is None or (id not in self._known and not found.over):
            one.unknown += 1
            if one.unknown >= LOST_POLLS and one.folder.holder() is None:
                self._settle(one, "interrupted", f"job {id} is known neither to squeue nor to sacct")
            elif self._asked is None and id not in self._ask_sacct:
                self._ask_sacct.append(id)
            return
        one.unknown = 0
        if not found.over:
            one.over = 0
            return
        one.over += 1
        if one.over < SURE_POLLS or (found.state == "COMPLETED" and one.over * self.options.poll_seconds < self.store.patience):
            return
        if found.state == "FAILED" and not self._seen:
            return  # perhaps its node does not see the store: _is_blind decides
        status, error = self._explain(sent, id, found)
        if status == "failed":
            last = one.folder.last_attempt()
            if last is not None and last.n > one.attempts and self._left_by(sent, unit, one.folder):  # else it is somebody else's
                last.record_failure(error)
        self._settle(one, status, error)

    def _left_by(self, sent: Submission, unit: int, folder: StageFolder) -> bool:
        """Nobody works at the stage, or the lease is the one of the job that is over: on another machine it looks alive for a
        while."""
        holder, start = folder.holder(), sent.start(unit)
        return holder is None or (start is not None and holder.get("host") == start["host"])

    def _explain(self, sent: Submission, id: str, found: Queued) -> tuple[Status, str]:
        if found.state == "CANCELLED" and "Dependency" in found.reason:
            return "skipped", "a stage that it needs did not end well"
        if found.state == "CANCELLED" and sent.stopped is not None:
            return "skipped", sent.stopped
        if found.state in WHY:
            status, text = WHY[found.state]
            return status, text.format(id=id, node=found.node or "an unknown node")
        if found.state == "COMPLETED":
            return "failed", f"job {id} ended, but its result is not in the store."
        log = job_log(sent, id)
        text = f"job {id} ended as {found.state}" + (f" ({found.reason})" if found.reason else "")
        return "failed", f"{text}:\n{ended.tail(log.read_text(errors='replace'))}" if log is not None else f"{text}."

    # Ends

    def _settle(self, one: _Watched, status: Status, error: str | None, tries: int = 0) -> None:
        outcome = self._outcome(one, status, error, tries)
        self._outcomes[one.stage.id] = outcome
        self.on_event(Event(kind="finished", stage=one.stage, attempt=one.attempt, outcome=outcome))
        if status == "done":
            return
        why = f"{one.stage.label or one.stage.id} is {status}"
        if status == "failed":
            self._stop_if_enough()
        for child in self._watched.values():
            if one.stage.id in child.stage.parents and child.stage.id not in self._outcomes:
                self._settle(child, "skipped", why)

    def _stop_if_enough(self) -> None:
        """Jobs count the failures that they live to tell of; a job that ended as a whole is counted here."""
        failed = self.failed_before + sum(one.status == "failed" for one in self._outcomes.values())
        most = self.options.max_failures
        if most is None or failed < most or not self.submissions or self.submissions[-1].stopped is not None:
            return
        self.submissions[-1].stop(stopped_after(failed))
        live = [id for one in self.submissions for id in lookup.live_jobs(one, self._queued)]
        if live:
            cluster.cancel(live)

    def _outcome(self, one: _Watched, status: Status, error: str | None, tries: int) -> Outcome:
        log = None
        if one.attempt is not None:
            record = AttemptRecord(one.attempt, int(one.attempt.name))
            log = record.log if record.log.exists() else None
            failure = record.failure() if status == "failed" else None
            if failure is not None and failure["traceback"]:
                error = ended.tail(failure["traceback"])
        seconds = time.monotonic() - one.began if one.began else 0.0
        return Outcome(status=status, error=error, seconds=seconds, log=log, tries=tries)

    def _is_blind(self) -> bool:
        """True if a job has run and has left no trace in the store for a while: its node does not see it."""
        if self._seen:
            return False
        newest = [one.jobs[-1] for one in self._watched.values() if one.jobs]
        for folder in {sent.folder / name for sent, _, _ in newest for name in ("units", "slurm")}:
            with contextlib.suppress(FileNotFoundError):
                os.listdir(folder)  # so that an NFS client looks again
        self._seen = any(
            sent.unit(unit).with_suffix(".seen.json").is_file() or job_log(sent, id) is not None for sent, unit, id in newest
        )
        ran = [self._queued[id] for _, _, id in newest if id in self._queued]
        if self._seen or not any(job.state in ("RUNNING", "FAILED") for job in ran):
            self._traceless_since = None
            return False
        self._traceless_since = self._traceless_since or time.monotonic()
        return time.monotonic() - self._traceless_since >= self.options.visible_seconds

    def _give_up(self) -> None:
        live = [id for one in self.submissions for id in one.jobs() if id in self._queued and not self._queued[id].over]
        node = next((job.node for job in self._queued.values() if job.node), "the node")
        text = (
            f"The compute nodes do not see the store {self.store.root}: a job ran on {node} and left no trace there. Put the store "
            "on a file system that login and compute nodes share (store=DIR)."
        )
        if live:
            try:
                cluster.cancel(live)
                text += f" The other {len(live)} jobs were cancelled."
            except ConfigError as error:
                text += f" The other {len(live)} jobs could not be cancelled: {error}"
        for one in self._watched.values():
            if one.stage.id not in self._outcomes:
                self._settle(one, "failed", text)

    def _queue_text(self) -> str:
        ids = {one.jobs[-1][2] for one in self._watched.values() if one.stage.id not in self._outcomes and one.jobs}
        return say_queue([self._queued[id] for id in ids if id in self._queued])


def job_log(sent: Submission, id: str) -> Path | None:
    """What the first process of a job printed: stderr where there is any, else stdout. None if it never began."""
    for name in (f"{id}_0_log.err", f"{id}_0_log.out"):
        path = sent.folder / "slurm" / name
        if path.is_file() and (path.stat().st_size or name.endswith("out")):
            return path
    return None


def say_queue(jobs: Sequence[Queued]) -> str:
    """`3 jobs run, 12 wait (10 Priority, 2 Dependency)`; empty without any."""
    running = sum(job.state in ("RUNNING", "COMPLETING", "CONFIGURING") for job in jobs)
    waiting = Counter(job.reason or job.state for job in jobs if job.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"))
    parts = [f"{running} job{'s run' if running != 1 else ' runs'}"] if running else []
    if waiting:
        count = sum(waiting.values())
        reasons = ", ".join(f"{number} {reason}" for reason, number in waiting.most_common(3))
        parts.append(f"{count} wait{'s' * (count == 1)} ({reasons})")
    return ", ".join(parts)


def come_back(store: Store, study: str) -> str:
    """What a person is told when the command returns and the jobs go on."""
    where, name = detach.where_is(store), shlex.quote(study)
    return (
        "The jobs go on.\n"
        f"  zexp status {name} --watch{where}   how far they are\n"
        f"  zexp logs STAGE -f{where}   what a stage prints\n"
        f"  zexp cancel {name}{where}   stops them at their next states\n"
        "The same command again goes on watching, and submits what is missing."
    )
