"""What runs inside a job: the stages of its unit, one after another, each in a process of its own.

submitit calls run() with the path of units/<k>.json, again after each requeue: what is in the store by then is not done
again. This process imports torch once and forks for each stage, as a slot of the local launcher does; it runs no operation
and touches no GPU, and a stage that is killed does not take it along.

USR2 (the time limit is near, or a preemption) and TERM (a preemption without warning, or scancel) are passed on as TERM: the
training writes a state at its next step. Then the job puts itself back into the queue, unless somebody cancelled it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from zexp.config.errors import ConfigError
from zexp.store import files, lease
from zexp.store.attempt import Attempt, AttemptRecord
from zexp.store.errors import StoreError
from zexp.store.folder import StageFolder, Store
from zexp.store.lease import LeaseTimes
from zexp.study import gate
from zexp.study.launch import ended
from zexp.study.launch.base import stopped_after
from zexp.study.launch.slurm import cluster, submission
from zexp.study.ranks import run_task
from zexp.study.stages import NEED_TORCH, Result, divergence, is_done, stage_folder

TOLD_BY = (signal.SIGUSR2, signal.SIGTERM)
LOOK_SECONDS = 0.05  # how often a running stage's process is looked at
REQUEUE_SECONDS = 300.0  # for how long a controller that is away is asked again
SILENT_SECONDS = 300.0  # of a slot; a job may wait for a parent to become visible meanwhile
WORD_SECONDS = 300.0  # how long the tasks of a job wait for their first one
WAIT_SECONDS = 60.0  # how long another holder of a stage is waited for before the allocation is given back


def run(unit: str) -> None:
    """The function of every job. Ends the process with status 1 if a stage of the unit is not done and will not be."""
    rank = int(os.environ.get("SLURM_PROCID", 0))
    code = _Job(Path(unit)).run() if rank == 0 else accompany(Path(unit))
    sys.stdout.flush()
    if code:
        raise SystemExit(code)


def accompany(path: Path) -> int:
    """What the other tasks of a job of several nodes do: wait for the first one's word, then train along as a rank.

    The exit code. The first task alone looks at the store, requeues the job and says how the stage ended.
    """
    unit = files.read_json(path)
    (stage,) = unit["stages"]
    word = _word_of(path)
    end = time.monotonic() + WORD_SECONDS
    while not word.is_file():
        if time.monotonic() > end:
            print(f"The first task said nothing for {WORD_SECONDS:g} s ({word}).", flush=True)
            return 1
        time.sleep(0.2)
        os.listdir(word.parent)  # so that an NFS client looks again
    if files.read_json(word)["run"]:
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # submitit's would swallow them
        run_task(unit["store"], stage["request"], times=LeaseTimes(**unit["lease_times"]))
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        end = time.monotonic() + 2 * REQUEUE_SECONDS
        while not files.read_json(word).get("over") and time.monotonic() < end:
            time.sleep(0.5)  # a task that ends begins the time in which srun lets the others end
    return 0


def _word_of(path: Path) -> Path:
    """Where the first task says whether this start of the job runs its stage."""
    start = f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', 0)}"
    return path.with_suffix(f".word-{start}.json")


@dataclass
class _Ended:
    """How a stage's process ended, as far as it has said. attempt: the folder of its attempt, if it got so far;
    waits_since: when it began to wait for another holder of its stage, if it does now."""

    result: Result = "failed"
    error: str | None = None
    attempt: Path | None = None
    waits_since: float | None = None

    def hear(self, said: Mapping[str, Any]) -> None:
        self.waits_since = None
        if said["op"] == "waiting":
            self.waits_since = time.monotonic()
        elif said["op"] == "started":
            self.attempt = Path(said["attempt"])
        elif said["op"] == "ended":
            self.result, self.error = said["result"], said["error"]


@dataclass
class _Job:
    """One start of a job. told: the first signal that asked it to stop."""

    path: Path
    told: str | None = None
    busy: bool = False  # gave up waiting for another holder
    _child: int | None = None
    _unit: dict[str, Any] = field(default_factory=dict)
    _said: dict[str, dict[str, Any]] = field(default_factory=dict)
    _seen: dict[str, Any] = field(default_factory=dict)
    _warm: bool = False
    _slot: lease.Lease | None = None
    _beaten: float = 0.0
    _gave_word: bool = False

    def run(self) -> int:
        self._unit = files.read_json(self.path)
        self.store = Store(Path(self._unit["store"]))
        for number in TOLD_BY:
            signal.signal(number, self._hear)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        told = self.path.with_suffix(".ended.json")
        self._said = files.read_json(told)["stages"] if told.is_file() else {}
        given_up = self._count_start()
        try:
            return self._run_stages(given_up)
        finally:
            self._give_word(run=self._gave_word, over=True)
            if self._slot is not None:
                self._slot.release()

    def _run_stages(self, given_up: str | None) -> int:
        """The exit code."""
        code = 0
        gave_up_at: str | None = None
        for stage in self._unit["stages"]:
            request = stage["request"]
            if self.told is not None:
                return self._requeue_or_stop()
            if self._is_there(request):
                self._say(request, "done")
                continue
            before = self._said.get(request["stage"])
            if before is not None and before["final"] and before["result"] in ("failed", "diverged"):
                code = 1  # at an earlier start; it is not tried again each time that another stage of the unit is interrupted
                continue
            if gave_up_at is not None:
                self._say(request, "skipped", f"its job has given up at {gave_up_at}")
                continue
            refusal = self._refusal(stage)
            if refusal is not None:
                if self.told is not None:
                    return self._requeue_or_stop()
                self._say(request, *refusal)
                code = 1
                continue
            if given_up is not None:
                self._fail(request, given_up)
                gave_up_at, code = request["stage"], 1
                continue
            self._preload(request)  # before a slot is taken, which does not beat meanwhile
            if not self._has_slot():
                return self._requeue_or_stop()
            result = self._stage(request)
            if result == "interrupted":
                return self._requeue_or_stop()
            code = code if result == "done" else 1
        return code

    # Before a stage

    def _count_start(self) -> str | None:
        """Note how far the unit is; the reason to give up if it was not further at the last few starts."""
        seen = self.path.with_suffix(".seen.json")
        before = files.read_json(seen) if seen.is_file() else None
        far = self._far()
        fruitless = 0
        if before is not None:
            fruitless = before["fruitless"]
            if before["far"] != far:
                fruitless = 0
            elif not before["waited"]:
                fruitless += 1
        starts = 1 if before is None else before["starts"] + 1
        facts = {"job": _id(), "host": os.uname().nodename, "node": os.environ.get("SLURMD_NODENAME"), "pid": os.getpid()}
        self._seen = {**facts, "time": time.time(), "starts": starts, "fruitless": fruitless, "far": far, "waited": False}
        files.write_json(seen, self._seen)
        print(f"start {starts} of {self.path}", flush=True)
        if fruitless < self._unit["max_fruitless"]:
            return None
        return (
            f"Given up: the job was started {starts} times, and the last {fruitless} times it was requeued without having come "
            "further than before (no new state, no result). Raise hydra.launcher.timeout_min, or look why it is stopped so early."
        )

    def _far(self) -> list[int]:
        """Results that are there, and tokens of the newest states."""
        done = tokens = 0
        for stage in self._unit["stages"]:
            request = stage["request"]
            try:
                folder = stage_folder(self.store, request)
            except StoreError:
                continue
            done += is_done(folder, request)
            if request["kind"] == "segment":
                tokens += max((t for t in folder.states() if t <= int(request["to"])), default=0)
        return [done, tokens]

    def _is_there(self, request: Mapping[str, Any]) -> bool:
        try:
            return is_done(stage_folder(self.store, request), request)
        except StoreError:
            return False  # the stage's own process says what is wrong

    def _refusal(self, stage: Mapping[str, Any]) -> tuple[Result, str] | tuple[str, str] | None:
        """Why a stage is not started: its parents are not there, its study was stopped, its sources run out."""
        stopped = self.path.parent.parent / submission.STOPPED
        if stopped.is_file():
            return "skipped", files.read_json(stopped)["reason"]
        for parent in stage["parents"]:
            folder = stage_folder(self.store, parent)
            place = f"states/{parent['to']}" if parent["kind"] == "segment" else "result"
            may_come = parent["sure"] or _can_appear(folder)
            if is_done(folder, parent) or (may_come and self.store.wait_for(folder.path / place)):
                continue
            why = divergence(folder, parent)
            if why is None and (holder := folder.holder()) is not None:
                self.busy = True
                self.told = f"{parent['label']} ({parent['stage']}) is in the hands of process {holder.get('pid')} on {holder.get('host')}"
            return "skipped", f"{parent['label']} ({parent['stage']}) {'is not done' if why is None else why}"
        if self._unit["gate"] is not None and stage["request"]["kind"] in NEED_TORCH:
            problems = gate.problems(files.read_json(Path(self._unit["gate"])), self.store)
            if problems:
                self._fail(stage["request"], str(ConfigError(problems)))
                return "failed", problems[0]
        return None

    def _has_slot(self) -> bool:
        """One of the study's slots is ours; else `told` says that there is none, and the allocation is given back.

        An array's own limit holds for the array alone; this one for all jobs of the study.
        """
        most = self._unit["max_parallel"]
        if most is None or self._slot is not None:
            return True
        folder = self.path.parents[3] / "slots"
        folder.mkdir(exist_ok=True)
        for number in range(most):
            self._slot = lease.take(folder / str(number), self.store.lease_times, gone=_is_silent)
            if self._slot is not None:
                return True
        self.busy, self.told = True, f"all {most} slots of the study are taken (hydra.launcher.max_parallel)"
        return False

    # A stage

    def _stage(self, request: dict[str, Any]) -> Result:
        """Run a stage, again after a failure as often as is asked for. interrupted: it goes on when the job is started again."""
        self._give_word(run=True)
        # Of several tasks the others end with a failed one, so a job of them is tried again by being requeued.
        before, most = self._said.get(request["stage"], {}).get("tries", 0), self._unit["retries"]
        for turn in range(before, most + 1):
            end = self._run(request)
            if self._is_there(request):
                self._say(request, "done")
                return "done"
            if end.result == "interrupted" or self.told is not None:
                return "interrupted"
            again = end.result == "failed" and turn < most
            self._say(request, end.result, end.error, attempt=end.attempt, tries=turn + 1, final=not again)
            if end.result == "failed" and end.attempt is not None:
                AttemptRecord(end.attempt, int(end.attempt.name)).record_failure(end.error or "no reason was given")
            if end.result != "failed":
                return end.result
            print(f"{request['stage']} failed: {end.error}", flush=True)
            if self._unit["tasks"] > 1 and again:
                self.busy, self.told = True, "it is tried again"
                return "interrupted"
        self._count_failure(request)
        return "failed"

    def _give_word(self, *, run: bool, over: bool = False) -> None:
        """Tell the other tasks of the job whether the stage runs at this start, and when all is said and done."""
        self._gave_word = run
        if self._unit["tasks"] > 1:
            files.write_json(_word_of(self.path), {"run": run, "over": over})

    def _preload(self, request: Mapping[str, Any]) -> None:
        if request["kind"] in NEED_TORCH and not self._warm:
            for module in self._unit["preload"]:
                importlib.import_module(module)
            gc.freeze()  # a collection in a child would copy every page of what is shared
            self._warm = True

    def _run(self, request: dict[str, Any]) -> _Ended:
        """One process for one try."""
        read_job, lifeline = os.pipe()
        report, write_report = os.pipe()
        sys.stdout.flush()
        # Not between the fork and the child's own handlers: the handler of the job would swallow it there.
        signal.pthread_sigmask(signal.SIG_BLOCK, TOLD_BY)
        pid = os.fork()
        if pid == 0:
            _be_the_child(self._unit, request, (lifeline, report), read_job, write_report)
        self._child = pid
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TOLD_BY)
        os.close(read_job)
        os.close(write_report)
        os.set_blocking(report, False)
        if self.told is not None:  # it came in between
            os.kill(pid, signal.SIGTERM)
        end, unread = _Ended(), b""
        kill_at: float | None = None
        while True:
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone:
                self._child = None
            unread = _read(report, unread, end)
            if gone:
                break
            now = time.monotonic()
            if self._slot is not None and now - self._beaten >= self.store.lease_times.heartbeat:
                self._slot.beat()
                self._beaten = now
            if end.waits_since is not None and now - end.waits_since > WAIT_SECONDS and self.told is None:
                self.busy, self.told = True, "another process has the stage in hand"
                os.kill(pid, signal.SIGTERM)
            if self.told is not None and kill_at is None:
                kill_at = now + self._unit["grace_seconds"]
            if kill_at is not None and now >= kill_at:
                os.kill(pid, signal.SIGKILL)
            time.sleep(LOOK_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what the stage started and left running
        os.close(report)
        os.close(lifeline)
        if end.error is None and end.result == "failed":
            end.error = ended.describe(os.waitstatus_to_exitcode(status))
        return end

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.told = self.told or signal.Signals(number).name
        if self.told == "SIGTERM" and number == signal.SIGUSR2:
            self.told = "SIGUSR2"  # the scheduler's own warning: it is no scancel
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self._child, signal.SIGTERM)

    # After a stage

    def _requeue_or_stop(self) -> int:
        """Go back into the queue, unless the job was cancelled; the exit code."""
        id = _id()
        if self._is_cancelled(id):
            return 1
        files.write_json(self.path.with_suffix(".seen.json"), {**self._seen, "waited": self.busy})
        print(f"{self.told}: job {id} goes back into the queue.", flush=True)
        end = time.monotonic() + REQUEUE_SECONDS
        while (why := cluster.requeue(id)) is not None and time.monotonic() < end:
            time.sleep(5.0)
            if self._is_cancelled(id):
                return 1
        if why is None:
            return 0
        print(f"Job {id} could not be requeued: {why}. `zexp run` again goes on from its last state.", flush=True)
        return 1

    def _is_cancelled(self, id: str) -> bool:
        """Somebody ended the job while it was stopping: requeueing would bring it back. Not so where its time is over: the warning
        before is not sent by a controller that was away."""
        job = cluster.job(id)
        if job is None or job.state == "RUNNING" or job.reason == "TimeLimit":
            return False
        print(f"{self.told}: the job was cancelled; it stops at its last state.", flush=True)
        return True

    def _count_failure(self, request: Mapping[str, Any]) -> None:
        """Stop the study when that many stages have failed, if that is asked for."""
        most = self._unit["max_failures"]
        if most is None:
            return
        folder = self.path.parent.parent
        (folder / "failed").mkdir(exist_ok=True)
        (folder / "failed" / request["stage"]).touch()
        failed = len(os.listdir(folder / "failed")) + self._unit["failed_before"]
        if failed < most:
            return
        reason, own = stopped_after(failed), submission.Submission("", folder)
        own.stop(reason)
        others = [id for id in own.jobs() if id != _id()]
        print(f"{reason}; its other jobs are cancelled", flush=True)
        if others:
            cluster.cancel(others)

    def _fail(self, request: dict[str, Any], why: str) -> None:
        """Record a failure that no process of the stage could record."""
        print(f"{request['stage']}: {why}", flush=True)
        folder = stage_folder(self.store, request)
        last = folder.last_attempt()
        if last is None and (taken := lease.take(folder.path, self.store.lease_times)) is not None:
            Attempt(folder, taken, request)  # so that whoever looks at the store later finds the reason there
            taken.release()
            last = folder.last_attempt()
        if last is not None and folder.holder() is None:  # else it is somebody else's
            last.record_failure(why)
        self._say(request, "failed", why, attempt=None if last is None else last.path)
        self._count_failure(request)

    def _say(
        self,
        request: Mapping[str, Any],
        result: str,
        error: str | None = None,
        attempt: Path | None = None,
        tries: int = 0,
        final: bool = True,
    ) -> None:
        """For those who follow: hints; what is done is in the store. final: this job does not try it again."""
        self._said[request["stage"]] = {
            "result": result,
            "error": error,
            "attempt": None if attempt is None else str(attempt),
            "tries": tries,
            "final": final,
        }
        files.write_json(self.path.with_suffix(".ended.json"), {"start": self._seen["starts"], "stages": self._said})


def _be_the_child(
    unit: Mapping[str, Any], request: dict[str, Any], not_mine: tuple[int, int], read_job: int, write_report: int
) -> None:
    try:
        os.setpgid(0, 0)  # so that what the stage starts can be ended with it
        for number in TOLD_BY:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TOLD_BY)
        for end in not_mine:
            os.close(end)
        from zexp.study.launch.child import run_job

        job = {key: unit[key] for key in ("store", "handlers", "tasks", "grace_seconds", "lease_times")}
        run_job({**job, "requests": [request], "devices": None}, read_job, write_report)
    finally:
        os._exit(1)


def _read(report: int, unread: bytes, end: _Ended) -> bytes:
    """What the child has said since, told to `end`; what is left of the last line."""
    while True:
        try:
            got = os.read(report, 1 << 16)
        except BlockingIOError:
            return unread
        if not got:
            return unread
        *lines, unread = (unread + got).split(b"\n")
        for line in lines:
            end.hear(json.loads(line))


def _is_silent(path: Path) -> bool:
    """True if a lease's file was not written for long, by the clock of the file system that holds it."""
    probe = path.parent / f".now-{os.uname().nodename}-{_id()}-{os.getpid()}"
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime > SILENT_SECONDS
    except FileNotFoundError:
        return False
    finally:
        probe.unlink(missing_ok=True)


def _can_appear(folder: StageFolder) -> bool:
    """False if what a parent makes is certainly not on its way: its last attempt failed, or nobody ever began it."""
    last = folder.last_attempt()
    return last is not None and last.failure() is None and folder.diverged() is None


def _id() -> str:
    """This job's id as squeue shows it."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
