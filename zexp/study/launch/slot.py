"""A slot's server: one process that has imported what stages need and starts a child process for each job.

It is the function of one submitit job. It imports torch and runs no operation of it, touches no GPU and starts no
thread, because a fork after a parent ran a threaded operation hangs: so a stage starts in 30 ms, not in the 3 s that
the import takes. Where processes are spawned (macOS) it imports nothing and only looks after its child.

Driver and server exchange JSON lines over a unix-domain socket; the driver connects nowhere, the server does.

    server → driver   {op: hello, slot, pid}   {op: ready}   {op: failed, error}
                      {op: started|waiting|ended, stage, …} as the child says it   {op: exit, status}
    driver → server   {op: run, job, lease}   {op: stop} (SIGTERM)   {op: kill}   {op: leave}   end of file: stop, then exit

With a job come `lease` descriptors, the locks of what it may use (pool.py). The child inherits them; the server closes its
own when the child has ended. Between jobs a server holds nothing.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

LINE_BYTES = 1 << 16
DESCRIPTORS = 64  # with one message; Linux takes 253


def serve(
    address: str, driver_pid: str, slot: str, preload: str, start_method: str, grace_seconds: str
) -> NoReturn:
    """Serve a driver until it goes away; strings only, because submitit pickles them.

    address: the driver's socket, in a folder of its own; preload: modules, joined by commas.
    """
    os.setsid()  # Ctrl-C and a closed terminal are the driver's business: it has the children write a state
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(number, signal.SIG_DFL)  # submitit's handlers would swallow SIGTERM
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked around the submission
    driver = socket.socket(socket.AF_UNIX)
    try:
        driver.connect(address)
        _send(driver, op="hello", slot=slot, pid=os.getpid())
    except OSError:
        os._exit(0)  # the driver ended while this process started
    try:
        for module in filter(None, preload.split(",")):
            importlib.import_module(module)
        gc.freeze()  # a collection in a child would copy every page of what is shared
    except BaseException:
        try:
            _send(driver, op="failed", error=traceback.format_exc())
        finally:
            os._exit(1)
    server = Server(driver, start_method, float(grace_seconds))
    try:
        server.run()
    finally:
        if _is_gone(int(driver_pid)):  # nobody else is left to remove the socket and submitit's files
            shutil.rmtree(os.path.dirname(address), ignore_errors=True)
        os._exit(0)


class Server:
    """At most one child at a time; looks after its signals and its end."""

    def __init__(self, driver: socket.socket, start_method: str, grace_seconds: float) -> None:
        self.driver = driver
        self.start_method = start_method
        self.grace_seconds = grace_seconds
        self._leaving = False
        self._child: int | None = None
        self._report = -1
        self._lifeline = -1
        self._kill_at: float | None = None
        self._from_driver = b""
        self._from_child = b""
        self._received: list[int] = []  # descriptors whose job has not been read yet
        self._lease: list[int] = []  # those of the child's job
        self._selector = selectors.DefaultSelector()
        self._heard, self._wake = socket.socketpair()

    def run(self) -> None:
        """Until the driver has gone and the child has ended."""
        for end in (self._heard, self._wake):
            end.setblocking(False)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)  # the wake-up byte is what counts
        signal.set_wakeup_fd(self._wake.fileno())
        self._selector.register(self.driver, selectors.EVENT_READ, self._hear_driver)
        self._selector.register(self._heard, selectors.EVENT_READ, self._hear_signal)
        self._say(op="ready")
        while not (self._leaving and self._child is None):
            for key, _ in self._selector.select(self._patience()):
                key.data()
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                self._kill_at = None
                self._kill()

    def _patience(self) -> float | None:
        return None if self._kill_at is None else max(0.0, self._kill_at - time.monotonic())

    def _say(self, **message: Any) -> None:
        try:
            _send(self.driver, **message)
        except OSError:
            self._leave()

    def _leave(self) -> None:
        """The driver has gone, or this server is told to go: the child writes a state, then this ends."""
        if not self._leaving:
            self._leaving = True
            self._selector.unregister(self.driver)
            self._terminate()
            self._kill_at = time.monotonic() + self.grace_seconds

    def _hear_driver(self) -> None:
        try:
            got, descriptors, _, _ = socket.recv_fds(self.driver, LINE_BYTES, DESCRIPTORS)
        except OSError:
            got, descriptors = b"", []
        for number in descriptors:
            os.set_inheritable(number, False)  # forks inherit it all the same; programs that a stage starts do not
        self._received += descriptors
        if not got:
            self._leave()
            return
        *lines, self._from_driver = (self._from_driver + got).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message["op"] == "run":
                self._start(message["job"], message["lease"])
            elif message["op"] == "stop":
                self._terminate()
            elif message["op"] == "kill":
                self._kill()
            elif message["op"] == "leave":
                self._leave()

    def _hear_signal(self) -> None:
        numbers = self._heard.recv(4096)
        if signal.SIGTERM in numbers:
            self._leave()
        if self._child is None:
            return
        pid, status = os.waitpid(self._child, os.WNOHANG)
        if pid:
            self._ended(os.waitstatus_to_exitcode(status))

    def _hear_child(self) -> None:
        got = os.read(self._report, LINE_BYTES)
        if not got:
            self._selector.unregister(self._report)
            return
        *lines, self._from_child = (self._from_child + got).split(b"\n")
        for line in lines:
            self._say(**json.loads(line))

    def _start(self, job: dict[str, Any], lease: int) -> None:
        assert self._child is None, "a slot runs one job at a time"
        self._lease, self._received = self._received[:lease], self._received[lease:]
        read_job, self._lifeline = os.pipe()
        self._report, write_report = os.pipe()
        os.set_blocking(self._report, False)
        start = self._fork if self.start_method == "fork" else self._spawn
        self._child = start(job, read_job, write_report)
        os.close(read_job)
        os.close(write_report)
        self._selector.register(self._report, selectors.EVENT_READ, self._hear_child)

    def _fork(self, job: dict[str, Any], read_job: int, write_report: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setpgid(0, 0)  # so that what the stage starts can be ended with it
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            self._selector.close()
            for end in (self.driver, self._wake, self._heard):
                end.close()  # else the driver would not notice this server's death
            os.close(self._lifeline)
            os.close(self._report)
            from zexp.study.launch.child import run_job

            run_job(job, read_job, write_report)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def _spawn(self, job: dict[str, Any], read_job: int, write_report: int) -> int:
        for number in (read_job, write_report, *self._lease):
            os.set_inheritable(number, True)
        command = [sys.executable, "-m", "zexp.study.launch.child", str(read_job), str(write_report)]
        pid = os.posix_spawn(sys.executable, command, os.environ, setpgroup=0)
        os.write(self._lifeline, json.dumps({**job, "lease": self._lease}).encode() + b"\n")
        return pid

    def _ended(self, status: int) -> None:
        """The child has ended: pass on its last words, end what it left running, tell the driver."""
        assert self._child is not None
        self._kill_group()
        try:
            while self._report in self._selector.get_map():
                self._hear_child()
        except BlockingIOError:
            self._selector.unregister(self._report)  # somebody that the stage started still has it open
        for number in (self._report, self._lifeline, *self._lease):
            os.close(number)
        self._lease = []
        self._child, self._kill_at, self._from_child = None, None, b""
        self._say(op="exit", status=status)

    def _terminate(self) -> None:
        if self._child is not None:
            os.kill(self._child, signal.SIGTERM)  # it is there: only _hear_signal waits for it

    def _kill(self) -> None:
        if self._child is not None:
            os.kill(self._child, signal.SIGKILL)
            self._kill_group()

    def _kill_group(self) -> None:
        """End what the child started and left running."""
        assert self._child is not None
        # Nothing is left: ProcessLookupError; PermissionError on macOS where only a zombie is.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child, signal.SIGKILL)


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def _send(to: socket.socket, **message: Any) -> None:
    to.sendall(json.dumps(message).encode() + b"\n")


def send_job(to: socket.socket, job: dict[str, Any], descriptors: Sequence[int]) -> None:
    """What a driver sends: a job with the descriptors of its lease, which stay open here."""
    for first in range(0, len(descriptors), DESCRIPTORS):
        socket.send_fds(to, [b" "], list(descriptors[first : first + DESCRIPTORS]))  # JSON may begin with blanks
    _send(to, op="run", job=job, lease=len(descriptors))
