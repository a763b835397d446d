"""The slots of this machine as leases, which all runs on it share: those of two terminals, of two users, of two stores.

    /tmp/zexp-slots/   core-0, GPU-<uuid>, GPU-<uuid>.1   a file for each unit, locked by who uses it
                       run-<pid>-<token>.json             what a run holds and whether it waits, for the others to read

A unit is taken by flock(2): whole ones exclusively, shares of a GPU by a shared lock of the GPU and an exclusive one of the
share. The driver takes the locks and hands their descriptors to the slot's server, from which the stage's process inherits
them; the driver keeps none. So the kernel gives a unit back when the last process that works on it has ended, however it
ended: at once, and not before. The leases of the store (zexp/store/lease.py) are for file systems that machines share:
with heartbeats, a silence to wait for, and a holder that must be fenced off. On one machine a lock needs none of that.

The folder is the same for all users (mode 1777, as /tmp); ZEXP_SLOTS_DIR names another one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zexp.config.errors import ConfigError
from zexp.store import files
from zexp.store.process import known_dead, this_process
from zexp.study.launch import turn
from zexp.study.launch.turn import Unit, Wish

FOLDER = "/tmp/zexp-slots"  # not tempfile's: TMPDIR differs from user to user
VARIABLE = "ZEXP_SLOTS_DIR"
FRESH_SECONDS = 5.0  # a run that waits says so twice a second; one that has not for so long (stopped) does not count
COMMAND_LENGTH = 60


@dataclass
class Held:
    """Units of one slot, and the descriptors that hold their locks until they are handed over or closed."""

    units: tuple[Unit, ...]
    descriptors: list[int]

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()


class Pool:
    """The units that a run may use, as it and the others see them. Raises ConfigError if the folder cannot be used."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = tuple(units)
        self.folder = folder()
        self.note = self.folder / f"run-{os.getpid()}-{secrets.token_hex(4)}.json"
        self._me = this_process()
        self._held: list[Held] = []
        self._wish: Wish | None = None
        self._written: dict[str, Any] | None = None
        # Whoever cleans old files out of /tmp leaves a locked folder alone (tmpfiles.d(5)).
        self._kept = self._lock_folder()

    @property
    def waits(self) -> bool:
        """The last take() was in vain."""
        return self._wish is not None

    def take(self, count: int) -> Held | None:
        """So many units, or None: then others give this run its turn, as long as it asks again at least each second."""
        since = self._wish.since if self._wish is not None else time.monotonic()
        mine = Wish(self.note.name, sum(len(held.units) for held in self._held), since, count, self.units)
        found = self._found(mine)
        self._wish = mine if found is None else None
        if found is not None:
            self._held.append(found)
        self._say()
        return found

    def rest(self) -> None:
        """This run has nothing to start for now."""
        if self._wish is not None:
            self._wish = None
            self._say()

    def give_back(self, held: Held) -> None:
        """What was taken is free again, or will be as soon as the processes that it was handed to have ended."""
        held.close()
        self._held.remove(held)
        self._say()

    def users(self) -> list[str]:
        """Who has units of this pool in hand, or is to have what is free next, for a person to read: `process 123 (zexp run …)`."""
        others = list(self._others())
        found = [
            one for one, _ in others if any(_unit(unit).excludes(own) for unit in one["held"] for own in self.units)
        ]
        if not found and self._wish is not None:
            first = {wish.name for wish in turn.before(self._wish, _wishes(others))}
            found = [one for one, _ in others if one["name"] in first]
        return [f"process {one['pid']} ({one['command']})" for one in found]

    def close(self) -> None:
        for held in list(self._held):
            held.close()
        self._held.clear()
        self.note.unlink(missing_ok=True)
        if self._kept is not None:
            os.close(self._kept)
            self._kept = None

    # Locks

    def _found(self, mine: Wish) -> Held | None:
        others = _wishes(self._others())
        first = not turn.before(mine, others)
        free: dict[Unit, list[int]] = {}
        try:
            own = {unit for held in self._held for unit in held.units}
            for unit in self.units:
                if unit not in own and (locks := self._lock(unit)) is not None:
                    free[unit] = locks
                    if first and mine.count == 1:
                        break  # whichever it is
            left = turn.left_for(mine, others, list(free))
            units = turn.chosen(self.units, left, mine.count)
            kept = self._lock_folder() if units is not None else None
            if units is None or kept is None:
                return None
            return Held(tuple(units), [kept, *(number for unit in units for number in free.pop(unit))])
        finally:
            for locks in free.values():
                for number in locks:
                    os.close(number)

    def _lock(self, unit: Unit) -> list[int] | None:
        """The descriptors of a unit that was free, None if it is in use."""
        name = re.sub(r"[^\w.-]", "_", unit.device)
        if unit.share is None:
            whole = self._lock_file(name, fcntl.LOCK_EX)
            return None if whole is None else [whole]
        common = self._lock_file(name, fcntl.LOCK_SH)
        if common is None:
            return None
        share = self._lock_file(f"{name}.{unit.share}", fcntl.LOCK_EX)
        if share is None:
            os.close(common)
            return None
        return [common, share]

    def _lock_file(self, name: str, how: int) -> int | None:
        path = self.folder / name
        while True:
            number = _open(path)
            try:
                fcntl.flock(number, how | fcntl.LOCK_NB)
                if os.stat(path).st_ino == os.fstat(number).st_ino:
                    return number
            except BlockingIOError:
                os.close(number)
                return None
            except FileNotFoundError:
                pass
            os.close(number)  # somebody removed the file in between: a lock of it says nothing

    def _lock_folder(self) -> int | None:
        number = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(number)  # it is being cleaned
            return None
        return number

    # Notes

    def _say(self) -> None:
        wish = self._wish
        wants = None if wish is None else {"count": wish.count, "since": wish.since, "units": _plain(wish.units)}
        held = _plain([unit for held in self._held for unit in held.units])
        note = {**self._me, "name": self.note.name, "command": command(), "held": held, "wants": wants}
        # A full or emptied /tmp: the others know less of this run, and its stages go on. What counts are the locks.
        with contextlib.suppress(OSError):
            if note != self._written or not self.note.exists():
                files.write_atomic(self.note, json.dumps(note), sync=False)
                os.chmod(self.note, 0o644)  # whatever the umask: other users are to read it
                self._written = note
            elif wants is not None:
                os.utime(self.note)

    def _others(self) -> Iterator[tuple[dict[str, Any], float]]:
        """What other living runs say, each with the seconds since it last did."""
        for path in self.folder.glob("run-*.json"):
            if path == self.note:
                continue
            try:
                age = time.time() - path.stat().st_mtime
                said = json.loads(path.read_bytes())
            except (FileNotFoundError, PermissionError):  # it ended; or it was written this very moment
                continue
            if known_dead(said) or said["boot"] != self._me["boot"]:  # the folder is this machine's own
                with contextlib.suppress(FileNotFoundError, PermissionError):  # another user's: only that one may
                    path.unlink()
                continue
            yield said, age


def folder() -> Path:
    """The folder of this machine's locks, made if there is none. Raises ConfigError if it cannot be used."""
    path = Path(os.environ.get(VARIABLE) or FOLDER)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = os.umask(0)
        try:
            path.mkdir(mode=0o1777)
        except FileExistsError:
            pass
        finally:
            os.umask(before)
        usable = stat.S_ISDIR(path.lstat().st_mode) and os.access(path, os.R_OK | os.W_OK | os.X_OK)
        problem = "" if usable else "it is no folder in which this account can write"
    except OSError as error:
        problem = str(error.strerror)
    if problem:
        raise ConfigError(
            f"{path}, where the runs on this machine share its slots, cannot be used: {problem}.\n"
            f"  {VARIABLE}=DIR in the environment names another folder, the same for everybody on the machine."
        )
    return path


def command() -> str:
    """This process as its user knows it, not too long."""
    said = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return said if len(said) <= COMMAND_LENGTH else f"{said[: COMMAND_LENGTH - 1]}…"


def _open(path: Path) -> int:
    """A file of the folder for locking, made if there is none."""
    while True:
        try:
            # Without O_CREAT: in such folders Linux refuses it for files of other users (fs.protected_regular).
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                made = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                os.fchmod(made, 0o644)
                os.close(made)


def _wishes(others: Any) -> list[Wish]:
    return [
        Wish(
            one["name"],
            len(one["held"]),
            one["wants"]["since"],
            one["wants"]["count"],
            tuple(_unit(unit) for unit in one["wants"]["units"]),
        )
        for one, age in others
        if one["wants"] is not None and age < FRESH_SECONDS
    ]


def _plain(units: Sequence[Unit]) -> list[list[Any]]:
    return [[unit.device, unit.share] for unit in units]


def _unit(plain: Sequence[Any]) -> Unit:
    return Unit(plain[0], plain[1])
