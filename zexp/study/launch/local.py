"""Stages on the slots of this machine, each slot a submitit job of the local executor.

The driver (this process) decides what runs where and when; a slot's server (slot.py) starts one child process at a
time. All that the two share is a socket: when the driver dies, servers have their stages write a state and go; when
a server dies, its stage is failed, its child stops at a state, and another server takes the slot.
"""

from __future__ import annotations

import contextlib
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
from zexp.store.folder import Store
from zexp.study import ranks
from zexp.study import stages as running
from zexp.study.launch import environment, machine, slot
from zexp.study.launch.base import Event, OnEvent, Outcome, Stage, Status
from zexp.study.launch.ended import describe, tail
from zexp.study.launch.options import LocalOptions
from zexp.study.launch.scheduler import Job, Schedule

if TYPE_CHECKING:
    from submitit import Job as SubmititJob

TICK_SECONDS = 0.5
LEAVE_SECONDS = 10.0  # how long a server may take to notice that it is over
SLOT_RESTARTS = 3  # of all slots of a launch together; more is no accident


@dataclass
class _Slot:
    """A slot as the driver sees it."""

    name: str
    devices: str
    submitted: SubmititJob[None] | None = None
    connection: socket.socket | None = None
    pid: int | None = None
    state: Literal["starting", "idle", "busy", "gone"] = "starting"
    job: Job | None = None
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
    _outcomes: dict[str, Outcome] = field(default_factory=dict)
    _slots: list[_Slot] = field(default_factory=list)
    _stopping: bool = False
    _kill_at: float | None = None
    _give_up_at: float | None = None  # for servers that answer no more
    _restarts: int = 0
    _ticked: float = 0.0

    def run(self) -> dict[str, Outcome]:
        self._schedule = Schedule(self.stages)
        self._tries = {stage.id: _Try() for stage in self.stages}
        self._devices = self._find_devices()
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
        return {stage.id: self._outcomes[stage.id] for stage in self.stages}

    # What runs where

    def _find_devices(self) -> list[str]:
        """CUDA_VISIBLE_DEVICES of each slot that this launch may use. Raises ConfigError if a GPU is asked for in vain."""
        wanted = {str(stage.request.get("device", "cpu")) for stage in self.stages}
        device = "cuda" if "cuda" in wanted else "auto" if "auto" in wanted else "cpu"
        found = machine.slots(device, self._threads(), max(ranks.count(stage.request) for stage in self.stages))
        if not found:
            raise machine.no_gpu()
        return found[: self.options.slots] if self.options.slots is not None else found

    def _threads(self) -> int:
        return max(int(stage.request.get("threads", 1)) for stage in self.stages)

    def _loop(self) -> None:
        for _ in range(min(len(self._devices), self._schedule.width())):
            self._start_slot()
        while not self._over():
            if not self._stopping:
                self._dispatch()
            for key, _ in self._selector.select(TICK_SECONDS):
                key.data()
            self._look_after_slots()
            if time.monotonic() - self._ticked >= TICK_SECONDS:
                self._ticked = time.monotonic()
                self.on_event(Event(kind="tick"))

    def _over(self) -> bool:
        if not self._stopping:
            return self._schedule.finished
        given_up = self._give_up_at is not None and time.monotonic() >= self._give_up_at
        return given_up or not any(one.state == "busy" for one in self._slots)

    def _dispatch(self) -> None:
        idle = [one for one in self._slots if one.state == "idle"]
        coming = sum(one.state == "starting" for one in self._slots)
        for one, job in zip(idle, self._schedule.jobs(len(idle) + coming), strict=False):
            self._schedule.start(job)
            for stage in job.stages:
                self._tries[stage.id] = _Try(tries=self._tries[stage.id].tries + 1, began=time.monotonic())
            one.state, one.job = "busy", job
            self._tell(
                one,
                op="run",
                job={
                    "store": str(self.store.root),
                    "requests": [stage.full_request() for stage in job.stages],
                    "handlers": self.options.handlers,
                    "grace_seconds": self.options.grace_seconds,
                },
            )
        if self._restarts > SLOT_RESTARTS:
            return
        free = len(self._devices) - sum(one.state != "gone" for one in self._slots)
        wanted = len(self._schedule.jobs(coming + free)) - coming
        for _ in range(min(free, wanted)):
            self._start_slot()

    # Slots

    def _start_slot(self) -> None:
        """Submit a server for the first slot that has none."""
        taken = {one.name for one in self._slots if one.state != "gone"}
        number = next(n for n in range(len(self._devices)) if str(n) not in taken)
        one = _Slot(str(number), self._devices[number])
        torch = any(stage.kind in running.NEED_TORCH for stage in self.stages)
        preload = self.options.preload if torch and self.options.start_method == "fork" else ()
        one.submitted = self._submit(
            str(self._folder / "driver"),
            str(os.getpid()),
            one.name,
            one.devices,
            ",".join(preload),
            self.options.start_method,
            str(self.options.grace_seconds),
        )
        self._slots.append(one)

    def _submit(self, *arguments: str) -> SubmititJob[None]:
        from submitit import LocalExecutor
        from submitit.core.utils import environment_variables

        executor = LocalExecutor(self._folder / "submitit")
        executor.update_parameters(timeout_min=60 * 24 * 365, name="zexp")  # a slot ends with its driver
        # SIGINT is blocked in what is started here: Ctrl-C reaches the whole process group, and submitit's controller
        # would kill its server one second later, in the middle of writing a state.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with environment_variables(**environment.of_stages(self._threads())):
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
                one.state, one.job = "idle", None
            else:
                self._stage_says(message)

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

    def _stage_says(self, message: Mapping[str, Any]) -> None:
        stage = self._schedule.stages[message["stage"]]
        known = self._tries[stage.id]
        if message["op"] == "waiting":
            holder = message["holder"]
            by = f"process {holder['pid']} on {holder['host']}" if holder.get("pid") else "another process"
            self.on_event(Event(kind="waiting", stage=stage, text=f"waits for {by}, which has it in hand"))
        elif message["op"] == "started":
            known.attempt, known.began = Path(message["attempt"]), time.monotonic()
            self.on_event(Event(kind="started", stage=stage, attempt=known.attempt))
        elif message["op"] == "ended":
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
            elif known.attempt is not None or not blamed:
                if known.attempt is not None:
                    AttemptRecord(known.attempt, int(known.attempt.name)).record_failure(why)
                self._end(stage, "failed", why)
                blamed = True
            else:
                known.tries -= 1
                self._schedule.requeue(stage.id)

    def _in_place(self, stage: Stage) -> bool:
        request = stage.full_request()
        try:
            return running.is_done(running.stage_folder(self.store, request), request)
        except StoreError:
            return False

    def _end(self, stage: Stage, status: Status, error: str | None) -> None:
        known = self._tries[stage.id]
        seconds = time.monotonic() - known.began if known.tries else 0.0
        outcome = self._outcome(known, status, error, seconds)
        if status == "failed" and known.tries <= self.options.retries and not self._stopping and known.tries:
            self._schedule.requeue(stage.id)
            self.on_event(Event(kind="retry", stage=stage, attempt=known.attempt, outcome=outcome))
            return
        self._settle(stage, outcome, known.attempt)
        if status == "interrupted" and self._stopping:
            return  # what comes after it is interrupted as well
        for skipped in self._schedule.end(stage.id, done=status == "done"):
            why = f"{stage.label or stage.id} is {status}"
            self._settle(skipped, Outcome(status="skipped", error=why), None)

    def _settle(self, stage: Stage, outcome: Outcome, attempt: Path | None) -> None:
        self._outcomes[stage.id] = outcome
        self.on_event(Event(kind="finished", stage=stage, attempt=attempt, outcome=outcome))

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
        busy = [one for one in self._slots if one.state == "busy"]
        seconds = f"{self.options.grace_seconds:g}"
        text = f"{why}: {len(busy)} running stage{'s write' if len(busy) != 1 else ' writes'} a state (at most {seconds} s; a second Ctrl-C does not wait)."
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
                self._outcomes[stage.id] = Outcome(status="interrupted", tries=self._tries[stage.id].tries)
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
