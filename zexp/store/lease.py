"""Leases: at most one process works in a stage folder, on any file system, without synchronised clocks.

lease.1, lease.2, … are files in the folder; the highest number holds. A holder changes the counter in its
file every 5 s. Whoever sees the *same* counter for 30 s of its own monotonic time creates the next number
with O_EXCL; at once if the file says released or its process is known to be dead. A lease is never deleted
or renamed, so a number is never given twice.

This is a fence, not a lock: a holder that was stopped and taken over goes on running until it calls check().
It is safe because holder n writes in attempts/n alone and publishes by a rename that the first one wins.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zexp.store import files
from zexp.store.errors import LeaseLost
from zexp.store.process import known_dead, this_process

_NAME = re.compile(r"lease\.([1-9]\d*)")
_RECORD_BYTES = 1024  # fixed, so that a beat overwrites the whole record in place
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LeaseTimes:
    """Seconds. Two processes that share a store must agree on timeout."""

    heartbeat: float = 5.0
    timeout: float = 30.0  # six missed beats
    poll: float = 0.5  # how often a waiting process looks


@dataclass(frozen=True)
class Holder:
    """What the highest lease says. facts is {} while its maker is between create and write."""

    n: int
    text: str
    facts: dict[str, Any]

    @property
    def free(self) -> bool:
        """The next number may be taken without waiting."""
        return bool(self.facts) and (self.facts["released"] is True or known_dead(self.facts))


def highest(folder: Path) -> int:
    """The number that holds; 0 if the folder has no lease or is not there."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return 0
    return max((int(match[1]) for name in names if (match := _NAME.fullmatch(name))), default=0)


def read(folder: Path) -> Holder | None:
    """The highest lease, or None."""
    n = highest(folder)
    return _holder(folder, n) if n else None


def acquire(
    folder: Path,
    times: LeaseTimes,
    *,
    done: Callable[[], bool] | None = None,
    on_wait: Callable[[dict[str, Any], float], None] | None = None,
) -> Lease | None:
    """Wait until this process holds the folder's lease. None if done() came true, before or after taking it.

    on_wait(facts of the holder, seconds waited) is called at every poll and may raise to give up.
    """
    began = time.monotonic()
    seen: Holder | None = None
    since = began
    floor = 0  # a directory listing may lag behind what O_EXCL said (NFS)
    while True:
        if done is not None and done():
            return None
        n = max(highest(folder), floor)
        holder = _holder(folder, n) if n else None
        now = time.monotonic()
        if holder != seen:
            seen, since = holder, now
        if holder is None or holder.free or now - since >= times.timeout:
            lease = _create(folder, n + 1, times)
            if lease is None:
                floor = n + 1
                continue
            if done is not None and done():  # the last holder published and released between our two looks
                lease.release()
                return None
            return lease
        if on_wait is not None:
            on_wait(holder.facts, now - began)
        time.sleep(times.poll)


def take(folder: Path, times: LeaseTimes, *, gone: Callable[[Path], bool] = lambda path: False) -> Lease | None:
    """The folder's lease if nobody holds it now; None at once if somebody does, or was quicker.

    gone(lease file): whether a holder that is not known to be dead has gone all the same.
    """
    n = highest(folder)
    if n:
        holder = _holder(folder, n)
        if not holder.free and not gone(folder / f"lease.{n}"):
            return None
    return _create(folder, n + 1, times)


def leave_released(folder: Path, n: int) -> None:
    """Write lease n, released, so that the next one taken is n + 1: for attempts that were made in another store."""
    _put(folder / f"lease.{n}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, _record(this_process(), 0, released=True))


class Lease:
    """Lease n of a folder, taken by acquire() or take(). Beats from start() to release(), in one process."""

    def __init__(self, folder: Path, n: int, times: LeaseTimes):
        self.folder = folder
        self.n = n
        self.path = folder / f"lease.{n}"
        self._times = times
        self._beats = 0
        self._process = this_process()
        self._thread: threading.Thread | None = None
        self._stop: threading.Event | None = None
        self._looked = -float("inf")

    @property
    def mine(self) -> bool:
        """False in a process forked after start(): that one has no heartbeat and must not release."""
        return self._process["pid"] == os.getpid()

    def start(self) -> None:
        """Beat from a thread of this process.

        Not done by acquire: a thread does not survive a fork, and the process that works is to beat.
        """
        self._process = this_process()
        self._write(released=False)
        self._stop = threading.Event()
        # daemon: a process that ends without release() must end; its lease then is a killed one's.
        self._thread = threading.Thread(target=self._beat, args=(self._stop,), name="lease", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """One beat, by a process that forks and so starts no thread: to be called every few seconds."""
        self._write(released=False)

    def check(self, *, fresh: bool = False) -> None:
        """Raises LeaseLost if this lease holds no more. Looks once a second at most, unless fresh."""
        now = time.monotonic()
        if not fresh and now - self._looked < min(1.0, self._times.heartbeat):
            return
        n = highest(self.folder)
        if n != self.n:
            if n < self.n:
                raise LeaseLost(f"{self.path} has disappeared: the folder was removed while it was in use.")
            by = _holder(self.folder, n).facts
            raise LeaseLost(
                f"{self.folder}: lease {self.n} was taken over by lease {n}"
                + (f" (process {by['pid']} on {by['host']})" if by else "")
                + ". This attempt publishes nothing more."
            )
        self._looked = now

    def release(self) -> None:
        """Stop beating and let the next one in at once. Does nothing in a forked child."""
        if self.mine:
            self.stop()
            self._write(released=True)

    def stop(self) -> None:
        """Stop beating without releasing. Does nothing in a forked child: the thread is its parent's."""
        if self.mine and self._thread is not None and self._stop is not None:
            self._stop.set()
            self._thread.join()
            self._thread = self._stop = None

    def _beat(self, stop: threading.Event) -> None:
        failing = False
        while not stop.wait(self._times.heartbeat):
            try:
                self._write(released=False)
                failing = False
            except OSError as error:  # disk full, server away: the next beat may do, check() decides
                if not failing:
                    _log.warning("%s: no heartbeat: %s", self.path, error)
                failing = True

    def _write(self, *, released: bool) -> None:
        # In place and without O_CREAT: never renamed, and not made again in a folder that was deleted.
        # No fsync: other processes read the page cache, other NFS clients see it from the close on.
        self._beats += 1
        _put(self.path, os.O_WRONLY, _record(self._process, self._beats, released))


def _create(folder: Path, n: int, times: LeaseTimes) -> Lease | None:
    lease = Lease(folder, n, times)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _put(lease.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _record(lease._process, 0, released=False))
    except FileExistsError:
        return None
    files.sync_folder(folder)
    return lease


def _record(process: dict[str, Any], beats: int, released: bool) -> bytes:
    raw = json.dumps({**process, "beats": beats, "released": released}).encode()
    assert len(raw) < _RECORD_BYTES, raw
    return raw.ljust(_RECORD_BYTES - 1) + b"\n"


def _put(path: Path, flags: int, record: bytes) -> None:
    descriptor = os.open(path, flags, 0o666)
    try:
        os.pwrite(descriptor, record, 0)
    finally:
        os.close(descriptor)


def _holder(folder: Path, n: int) -> Holder:
    try:
        text = (folder / f"lease.{n}").read_text(errors="replace")
    except FileNotFoundError:
        text = ""
    try:
        facts = json.loads(text)
    except ValueError:  # empty, or read in the middle of a beat: a different text, so a sign of life
        facts = {}
    return Holder(n, text, facts if isinstance(facts, dict) and "released" in facts else {})
