"""Stages on the slots of this machine, each slot a submitit job of the local executor.

The driver (this process) decides what runs where and when; a slot's server (slot.py) starts one child process at a
time. All that the two share is a socket: when the driver dies, servers have their stages write a state and go; when
a server dies, its stage is failed, its child stops at a state, and another server takes its place.

What a job may use (cores, GPUs) is taken from the pool of the whole machine for that job alone (pool.py), and only if a
stage can start that nobody else has in hand. A server stays between jobs, for it is warm, and holds nothing of the pool.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from zexp.store.attempt import AttemptRecord
from zexp.store.errors import StoreError
from zexp.store.folder import StageFolder, Store
from zexp.study import stages as running
from zexp.study.launch import environment, slot
from zexp.study.launch.base import Event, OnEvent, Outcome, Size, Stage, Status, stopped_after
from zexp.study.launch.capacity import capacity
from zexp.study.launch.elsewhere import Elsewhere, waits_for
from zexp.study.launch.ended import describe, tail
from zexp.study.launch.options import LocalOptions
from zexp.study.launch.pool import Held, Pool
from zexp.study.launch.scheduler import Job, Schedule

if TYPE_CHECKING:
    from submitit import Job as SubmititJob

TICK_SECONDS = 0.5
POLL_SECONDS = 0.2  # how often a driver looks that waits for units of the machine
PATIENCE_SECONDS = 1.0  # before it says so: others give units back within moments
LEAVE_SECONDS = 10.0  # how long a server may take to notice that it is over
SLOT_RESTARTS = 3  # of all slots of a launch together; more is no accident


@dataclass
class _Slot:
    """A slot's server as the driver sees it. lease: while it starts or is busy, the units that are its."""

    name: str
    size: Size
    lease: Held | None = None
    submitted: SubmititJob[None] | None = None
    connection: socket.socket | None = None
    pid: int | None = None
    state: Literal["starting", "idle", "busy", "left", "gone"] = "starting"
    job: Job | None = None
    yielding: bool = False  # its job was told to stop, because another run has a stage of it in hand
    unread: bytes = b""
    error: str | None = None  # why it could not start


@dataclass
class _Try:
    """What is known of a stage that is not over."""

    tries: int = 0
    began: float = 0.0
    seconds: float = 0.0
    attempt: Path | None = None
    ended: bool = False


@dataclass
class LocalLaunch:
    """One launch; see launch() in launch/__init__.py for the contract of run()."""

    stages: Sequence[Stage]
    store: Store
    options: LocalOptions
    on_event: OnEvent
    failed_before: int = 0  # stages of the study that have failed in an earlier launch
    _outcomes: dict[str, Outcome] = field(default_factory=dict)
    _slots: list[_Slot] = field(default_factory=list)
    _folders: dict[str, StageFolder] = field(default_factory=dict)
    _looked: dict[str, float] = field(default_factory=dict)  # when it was looked whether a stage is in other hands
    _said: set[tuple[str, int]] = field(default_factory=set)  # (stage, pid) that was said to be waited for
    _stopping: bool = False
    _gave_up: str | None = None  # why, if it is stopping because of failures
    _kill_at: float | None = None
    _give_up_at: float | None = None  # for servers that answer no more
    _restarts: int = 0
    _ticked: float = 0.0
    _starved: float | None = None  # since when nothing runs for want of units; infinity once that was said

    def run(self) -> dict[str, Outcome]:
        self._schedule = Schedule(self.stages)
        self._tries = {stage.id: _Try() for stage in self.stages}
        self._elsewhere = Elsewhere(self.store.lease_times)
        self._capacity = capacity([stage.request for stage in self.stages], self.options)
        self._pool = Pool(self._capacity.units)
        try:
            self._selector = selectors.DefaultSelector()
            self._folder = _short_folder()
            self._listener = socket.socket(socket.AF_UNIX)
            try:
                self._listener.bind(str(self._folder / "driver"))
                self._listener.listen(128)
                self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
                with self._signals():
                    self._loop()
            finally:
                self._close()
        finally:
            self._pool.close()
        return {stage.id: self._outcomes[stage.id] for stage in self.stages}

    # What runs where

    def _loop(self) -> None:
        while not self._over():
            if not self._stopping:
                self._dispatch()
            for key, _ in self._selector.select(POLL_SECONDS if self._pool.waits else TICK_SECONDS):
                key.data()
            self._look_after_slots()
            if time.monotonic() - self._ticked >= TICK_SECONDS:
                self._ticked = time.monotonic()
                self.on_event(Event(kind="tick"))
                if not self._stopping:
                    self._look_elsewhere()

    def _over(self) -> bool:
        if not self._stopping:
            return self._schedule.finished
        given_up = self._give_up_at is not None and time.monotonic() >= self._give_up_at
        return given_up or not any(one.state == "busy" for one in self._slots)

    def _dispatch(self) -> None:
        """Start what can start, on units that this run gets; give back what it has no use for."""
        idle = [one for one in self._slots if one.state == "idle"]
        free = [one.size for one in idle if one.lease is None]
        leases: list[tuple[Size, Held]] = []  # (size that they are for, units)
        for one in idle + [one for one in self._slots if one.state == "starting"]:
            if one.lease is None or (one.state == "starting" and one.size not in free):
                continue
            if one.state == "starting":  # a warm server does at once what this one is still being started for
                free.remove(one.size)
            leases.append((one.size, one.lease))
            one.lease = None
        coming = [one.size for one in self._slots if one.state == "starting" and one.lease is not None]
        denied = self._take(coming, leases)
        for job in _without(self._next(len(coming) + len(leases)), coming):
            found = next((n for n, (size, _) in enumerate(leases) if size == job.size), None)
            if found is not None:
                _, lease = leases.pop(found)
                self._start(job, lease)
        for _, lease in leases:
            self._pool.give_back(lease)
        self._say_starved(denied)

    def _take(self, coming: Sequence[Size], leases: list[tuple[Size, Held]]) -> bool:
        """Add leases for whatever more could start; True if the machine has not enough for now."""
        least = min(stage.size for stage in self.stages)
        most = min(self._capacity.slots(least), self.options.slots or len(self._capacity.units))
        busy = sum(one.state == "busy" for one in self._slots)
        ours = [*coming, *(size for size, _ in leases)]
        wanted = _without(self._next(max(len(ours), most - busy)), ours)
        if self._restarts > SLOT_RESTARTS:
            wanted = wanted[: sum(one.state == "idle" for one in self._slots)]
        for job in wanted:
            lease = self._pool.take(self._capacity.need(job.size))
            if lease is None:
                return True
            leases.append((job.size, lease))
        self._pool.rest()
        return False

    def _next(self, slots: int) -> list[Job]:
        """The jobs for so many slots, of stages that are neither done by now nor in other hands."""
        while True:
            jobs = self._schedule.jobs(slots)
            now = time.monotonic()
            asked = [s for job in jobs for s in job.stages if now - self._looked.get(s.id, 0.0) >= TICK_SECONDS]
            self._looked |= dict.fromkeys((stage.id for stage in asked), now)
            if not [stage for stage in asked if self._is_elsewhere(stage)]:
                return jobs

    def _start(self, job: Job, lease: Held) -> None:
        """On an idle server of its size; else it is left for one that starts, which has the lease until then."""
        idle = [one for one in self._slots if one.state == "idle"]
        one = next((one for one in idle if one.size == job.size), None)
        if one is None:
            coming = [one for one in self._slots if (one.state, one.size, one.lease) == ("starting", job.size, None)]
            if coming:
                coming[0].lease = lease
                return
            if self._restarts > SLOT_RESTARTS:
                self._pool.give_back(lease)
                return
            if idle:  # for another size; one server a slot is enough
                self._tell(idle[0], op="leave")
                idle[0].state = "left"
            self._start_slot(job.size, lease)
            return
        self._schedule.start(job)
        for stage in job.stages:
            self._tries[stage.id] = _Try(tries=self._tries[stage.id].tries + 1, began=time.monotonic())
        one.state, one.job, one.lease = "busy", job, lease
        assert one.connection is not None
        task = {
            "store": str(self.store.root),
            "lease_times": dataclasses.asdict(self.store.lease_times),
            "requests": [stage.full_request() for stage in job.stages],
            "handlers": self.options.handlers,
            "grace_seconds": self.options.grace_seconds,
            "devices": self._capacity.devices(lease.units),
        }
        with contextlib.suppress(OSError):  # it has died: reading says so, in order with what it said before
            slot.send_job(one.connection, task, lease.descriptors)
        lease.close()  # the server has them, or they are free

    def _say_starved(self, denied: bool) -> None:
        """Once, when nothing of this run can run because others have the machine."""
        if not denied or any(one.state in ("starting", "busy") for one in self._slots):
            self._starved = None
        elif self._starved is None:
            self._starved = time.monotonic()
        elif time.monotonic() - self._starved >= PATIENCE_SECONDS:
            self._starved = float("inf")
            users = " and ".join(self._pool.users()) or "processes that are ending"
            count = self._capacity.slots(min(stage.size for stage in self._schedule.ready()))
            all_slots = f"All {count} slots of this machine are" if count > 1 else "The one slot of this machine is"
            self.on_event(Event(kind="slot", text=f"{all_slots} in use by {users}; waiting."))

    # Stages that others have in hand

    def _is_elsewhere(self, stage: Stage) -> bool:
        """A ready stage needs no slot: it is done by now, or another process has it in hand and it is left to that one."""
        if self._in_place(stage):
            self._end(stage, "done", None)
            return True
        folder = self._folder_of(stage)
        holder = self._elsewhere.holder(stage.id, folder) if folder is not None else None
        if holder is None:
            return False
        self._schedule.leave(stage.id)
        self._say_waiting(stage, holder)
        return True

    def _look_elsewhere(self) -> None:
        """What became of the stages that others have."""
        for stage in self._schedule.elsewhere():
            folder = self._folder_of(stage)
            if self._in_place(stage):
                self._end(stage, "done", None)
            elif folder is None or self._elsewhere.holder(stage.id, folder) is None:
                self._schedule.take_back(stage.id)

    def _say_waiting(self, stage: Stage, holder: Mapping[str, Any]) -> None:
        if (stage.id, holder.get("pid", 0)) not in self._said:
            self._said.add((stage.id, holder.get("pid", 0)))
            self.on_event(Event(kind="waiting", stage=stage, text=waits_for(holder)))

    # Slots

    def _start_slot(self, size: Size, lease: Held) -> None:
        """Submit a server for stages of one size. The lease is its first job's: to import is work as well."""
        taken = {one.name for one in self._slots if one.state not in ("gone", "left")}
        name = next(str(n) for n in range(len(taken) + 1) if str(n) not in taken)
        one = _Slot(name, size, lease)
        torch = any(stage.kind in running.NEED_TORCH for stage in self.stages)
        preload = self.options.preload if torch and self.options.start_method == "fork" else ()
        one.submitted = self._submit(
            size.threads,
            str(self._folder / "driver"),
            str(os.getpid()),
            one.name,
            ",".join(preload),
            self.options.start_method,
            str(self.options.grace_seconds),
        )
        self._slots.append(one)

    def _submit(self, threads: int, *arguments: str) -> SubmititJob[None]:
        from submitit import LocalExecutor
        from submitit.core.utils import environment_variables

        executor = LocalExecutor(self._folder / "submitit")
        executor.update_parameters(timeout_min=60 * 24 * 365, name="zexp")  # a slot ends with its driver
        # SIGINT is blocked in what is started here: Ctrl-C reaches the whole process group, and submitit's controller
        # would kill its server one second later, in the middle of writing a state.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with environment_variables(**environment.of_stages(threads)):
                return executor.submit(slot.serve, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        unread = b""

        def hear() -> None:  # until it has said which slot it is
            nonlocal unread
            got = connection.recv(slot.LINE_BYTES)
            unread += got
            if got and b"\n" not in unread:
                return
            self._selector.unregister(connection)
            if not got:
                connection.close()
                return
            line, _, rest = unread.partition(b"\n")
            hello = json.loads(line)
            one = next(one for one in self._slots if one.name == hello["slot"] and one.state == "starting")
            one.connection, one.pid = connection, hello["pid"]
            self._selector.register(connection, selectors.EVENT_READ, lambda: self._hear(one))
            self._read(one, rest)

        self._selector.register(connection, selectors.EVENT_READ, hear)

    def _hear(self, one: _Slot) -> None:
        assert one.connection is not None
        try:
            got = one.connection.recv(slot.LINE_BYTES)
        except ConnectionResetError:
            got = b""
        if got:
            self._read(one, got)
        else:
            self._lose(one)

    def _read(self, one: _Slot, got: bytes) -> None:
        *lines, one.unread = (one.unread + got).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message["op"] == "ready":
                one.state = "idle"
            elif message["op"] == "failed":
                one.error = message["error"]
            elif message["op"] == "exit":
                self._job_ended(one, describe(message["status"]))
                self._give_back(one)
                one.state, one.job, one.yielding = "idle", None, False
            else:
                self._stage_says(one, message)

    def _give_back(self, one: _Slot) -> None:
        if one.lease is not None:
            self._pool.give_back(one.lease)
            one.lease = None

    def _tell(self, one: _Slot, **message: Any) -> None:
        if one.connection is None:
            return
        with contextlib.suppress(OSError):  # it has died: reading says so, in order with what it said before
            one.connection.sendall(json.dumps(message).encode() + b"\n")

    def _look_after_slots(self) -> None:
        for one in self._slots:
            if (
                one.state == "starting"
                and one.connection is None
                and one.submitted is not None
                and one.submitted.done()
            ):
                self._lose(one)
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._kill()
        if self._restarts > SLOT_RESTARTS and all(one.state == "gone" for one in self._slots):
            for stage in self._schedule.ready():
                self._end(stage, "failed", f"No slot is left. {self._slots[-1].error}")

    def _lose(self, one: _Slot) -> None:
        """A server has died: its stage is failed, the slot is free for another server."""
        if one.connection is not None:
            self._selector.unregister(one.connection)
            one.connection.close()
            one.connection = None
        self._give_back(one)
        if one.state == "left":
            one.state = "gone"
            return
        stderr = one.submitted.stderr() if one.submitted is not None else None
        said = one.error or tail(stderr or "")
        one.error = f"The server of slot {one.name} ended unexpectedly" + (f":\n{said}" if said else ".")
        one.state = "gone"
        self._restarts += 1
        self.on_event(Event(kind="slot", text=one.error))
        if one.job is not None:
            self._job_ended(one, one.error)
            one.job = None

    # Stages

    def _stage_says(self, one: _Slot, message: Mapping[str, Any]) -> None:
        stage = self._schedule.stages[message["stage"]]
        known = self._tries[stage.id]
        if message["op"] == "waiting":
            self._say_waiting(stage, message["holder"])
            folder = self._folder_of(stage)
            if folder is not None and self._elsewhere.holder(stage.id, folder) is not None:
                one.yielding = True  # it was taken since this run looked: the slot is of better use elsewhere
                self._tell(one, op="stop")  # (else its holder is silent, and the process waits to take it over)
        elif message["op"] == "started":
            known.attempt, known.began = Path(message["attempt"]), time.monotonic()
            self.on_event(Event(kind="started", stage=stage, attempt=known.attempt))
        elif message["op"] == "ended":
            if message["result"] == "interrupted" and one.yielding and not self._stopping:
                return  # _job_ended puts it back
            known.ended = True
            self._end(stage, message["result"], message["error"])

    def _job_ended(self, one: _Slot, why: str) -> None:
        """The job's process is gone: whatever of it has not ended was interrupted, or is to blame, or never began."""
        assert one.job is not None
        blamed = False
        for stage in one.job.stages:
            known = self._tries[stage.id]
            if known.ended:
                continue
            if self._in_place(stage):
                self._end(stage, "done", None)
            elif self._stopping:
                self._end(stage, "interrupted", "stopped before its next state")
            elif one.yielding:
                self._put_back(stage)
            elif known.attempt is not None or not blamed:
                if known.attempt is not None:
                    AttemptRecord(known.attempt, int(known.attempt.name)).record_failure(why)
                self._end(stage, "failed", why)
                blamed = True
            else:
                self._put_back(stage)

    def _put_back(self, stage: Stage) -> None:
        """A stage of a job that has ended, without any blame: it may start again."""
        known = self._tries[stage.id]
        self._tries[stage.id] = _Try(tries=known.tries - (known.attempt is None))
        self._schedule.requeue(stage.id)

    def _in_place(self, stage: Stage) -> bool:
        folder = self._folder_of(stage)
        return folder is not None and running.is_done(folder, stage.full_request())

    def _folder_of(self, stage: Stage) -> StageFolder | None:
        """Its folder; None if it was never created, which its process says when it starts."""
        if stage.id not in self._folders:
            try:
                self._folders[stage.id] = running.stage_folder(self.store, stage.full_request())
            except StoreError:
                return None
        return self._folders[stage.id]

    def _end(self, stage: Stage, status: Status, error: str | None) -> None:
        known = self._tries[stage.id]
        seconds = time.monotonic() - known.began if known.began else 0.0
        if status == "interrupted" and self._gave_up is not None:
            status, error = "skipped", self._gave_up
        outcome = self._outcome(known, status, error, seconds)
        if status == "failed" and known.tries <= self.options.retries and not self._stopping and known.tries:
            self._tries[stage.id] = _Try(tries=known.tries, ended=True)
            self._schedule.requeue(stage.id)
            self.on_event(Event(kind="retry", stage=stage, attempt=known.attempt, outcome=outcome))
            return
        self._settle(stage, outcome, known.attempt)
        if self._stopping and status in ("interrupted", "skipped"):
            return  # so is what comes after it
        for skipped in self._schedule.end(stage.id, done=status == "done"):
            why = f"{stage.label or stage.id} is {status}"
            self._settle(skipped, Outcome(status="skipped", error=why), None)

    def _settle(self, stage: Stage, outcome: Outcome, attempt: Path | None) -> None:
        self._outcomes[stage.id] = outcome
        self.on_event(Event(kind="finished", stage=stage, attempt=attempt, outcome=outcome))
        failed = self.failed_before + sum(one.status == "failed" for one in self._outcomes.values())
        most = self.options.max_failures
        if outcome.status == "failed" and most is not None and failed >= most and not self._stopping:
            self._gave_up = stopped_after(failed)
            self._stop(self._gave_up.capitalize())

    def _outcome(self, known: _Try, status: Status, error: str | None, seconds: float) -> Outcome:
        log = None
        if known.attempt is not None:
            record = AttemptRecord(known.attempt, int(known.attempt.name))
            log = record.log if record.log.exists() else None
            failure = record.failure() if status == "failed" else None
            if failure is not None and failure["traceback"]:
                error = tail(failure["traceback"])
        return Outcome(status=status, error=error, seconds=seconds, log=log, tries=known.tries)

    # Stopping

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM stop the launch; the second one does not wait for states."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard, wake = socket.socketpair()
        heard.setblocking(False)
        wake.setblocking(False)

        def stop(number: int, frame: FrameType | None) -> None:
            pass  # the wake-up byte is what counts: it ends the driver's waiting

        def hear() -> None:
            for number in heard.recv(4096):
                if number in (signal.SIGINT, signal.SIGTERM):
                    self._kill() if self._stopping else self._stop(signal.Signals(number).name)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        wakeup = signal.set_wakeup_fd(wake.fileno())
        self._selector.register(heard, selectors.EVENT_READ, hear)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._selector.unregister(heard)
            heard.close()
            wake.close()

    def _stop(self, why: str) -> None:
        self._stopping = True
        self._kill_at = time.monotonic() + self.options.grace_seconds
        busy = [one for one in self._slots if one.job is not None and any(s.id not in self._outcomes for s in one.job.stages)]
        seconds = f"{self.options.grace_seconds:g}"
        text = f"{why}: {len(busy)} running stage{'s write' if len(busy) != 1 else ' writes'} a state (at most {seconds} s; a second Ctrl-C does not wait)."
        if not busy:
            text = f"{why}: no stage was running."
        self.on_event(Event(kind="stopping", text=text))
        for one in busy:
            self._tell(one, op="stop")

    def _kill(self) -> None:
        self._kill_at, self._give_up_at = None, time.monotonic() + LEAVE_SECONDS
        for one in self._slots:
            if one.state == "busy":
                self._tell(one, op="kill")

    def _close(self) -> None:
        """Whatever has no outcome was interrupted; no server and no file is left behind."""
        for stage in self.stages:
            if stage.id not in self._outcomes:
                status: Status = "interrupted" if self._gave_up is None else "skipped"
                tries = self._tries[stage.id].tries
                self._outcomes[stage.id] = Outcome(status=status, error=self._gave_up, tries=tries)
        for one in self._slots:
            if one.state == "starting" and one.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one.pid, signal.SIGTERM)  # in the middle of its imports, where it hears nothing
            self._tell(one, op="leave")
            if one.connection is not None:
                one.connection.close()
        self._listener.close()
        self._selector.close()
        wait = LEAVE_SECONDS + (self.options.grace_seconds if any(s.state == "busy" for s in self._slots) else 0)
        until = time.monotonic() + wait
        for one in self._slots:
            while one.submitted is not None and not one.submitted.done() and time.monotonic() < until:
                time.sleep(0.01)
        shutil.rmtree(self._folder, ignore_errors=True)


def _short_folder() -> Path:
    """A new folder for the socket, whose path may have 104 bytes (macOS), and for submitit's files."""
    folder = Path(tempfile.mkdtemp(prefix="zexp-"))
    if len(os.fsencode(folder / "driver")) <= 100:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="zexp-", dir="/tmp"))


def _without(jobs: Sequence[Job], sizes: Sequence[Size]) -> list[Job]:
    """The jobs but the last ones, which servers that start take: one job of each size given."""
    kept = list(jobs)
    for size in sizes:
        last = next((n for n in reversed(range(len(kept))) if kept[n].size == size), None)
        if last is not None:
            del kept[last]
    return kept
