"""One try at a stage, by the process that holds its lease.

It writes in attempts/<n> alone: request.yaml, metrics.jsonl, progress.json, log, failure.json, temporaries.
What counts leaves from there by publish(): one rename, after a last look at the lease.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import time
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from zexp.store import files
from zexp.store.errors import LeaseLost, StoreError
from zexp.store.lease import Lease

if TYPE_CHECKING:
    from zexp.store.folder import StageFolder

_TARGET = {"trajectory": re.compile(r"states/(0|[1-9]\d*)")}  # every other kind: result
_RESULT = re.compile("result")
_TEMPORARIES = "tmp"
_GONE = ".gone-"
_PROGRESS_SECONDS = 0.5


class Attempt:
    """A context manager: `with folder.attempt(request) as attempt: …`, in the process that does the work.

    Entering starts the heartbeat. Leaving stops it, deletes the temporaries and releases the lease. An
    exception is written to failure.json first, unless it is an interruption (KeyboardInterrupt) or the lease
    is lost; any Exception after the lease was lost comes out as LeaseLost.
    """

    def __init__(self, folder: StageFolder, lease: Lease, request: dict[str, Any]):
        self.folder = folder
        self.n = lease.n
        self.path = folder.path / "attempts" / str(lease.n)
        self._lease = lease
        self._metrics: FileIO | None = None
        self._progress_written = -math.inf
        self.path.mkdir(parents=True, exist_ok=True)
        files.write_yaml(self.path / "request.yaml", request)

    @property
    def log(self) -> Path:
        """Where the process's output belongs."""
        return self.path / "log"

    def __enter__(self) -> Self:
        try:
            self._lease.start()
            for record in self.folder.attempts():
                if record.n < self.n:  # killed ones leave their temporaries; a state's can be gigabytes
                    _clear(record.path)
        except BaseException:
            self._lease.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._lease.mine:  # a forked child that unwinds through its parent's with
            return
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        try:
            self._lease.check(fresh=True)
            if error is not None and not isinstance(error, (KeyboardInterrupt, GeneratorExit, LeaseLost)):
                text = "".join(traceback.format_exception_only(error)).strip()
                _write_failure(self.path, text, "".join(traceback.format_exception(error)))
            _clear(self.path)
        except LeaseLost as lost:
            self._lease.stop()
            if error is None or (isinstance(error, Exception) and not isinstance(error, LeaseLost)):
                raise lost from error  # a file that the new holder removed is no failure of the stage
        else:
            self._lease.release()
        finally:
            self._lease.stop()

    def check(self, *, fresh: bool = False) -> None:
        """Raises LeaseLost if somebody took over. For every step: looks once a second, unless fresh."""
        self._lease.check(fresh=fresh)

    def scratch(self, name: str) -> Path:
        """A new, empty folder in attempts/<n>/tmp, to build in and publish. Deleted when the attempt ends."""
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise ValueError(f"scratch({name!r}): a plain file name, please.")
        parent = self.path / _TEMPORARIES
        path = parent / name
        copy = 1
        while path.exists():
            copy += 1
            path = parent / f"{name}-{copy}"
        path.mkdir(parents=True)
        return path

    def publish(self, scratch: Path, target: str, *, rolling: bool = False) -> bool:
        """Make a scratch folder the folder's "result" or "states/<tokens>". False if that was there already.

        Adds the checksums of all files to manifest.json (which may be there, with other keys), last of all.
        rolling: a state that is only for resuming; retention may remove it.
        Raises LeaseLost if somebody took over, StoreError if something unpublished has the target's name.
        """
        self._require(target)
        self._lease.check(fresh=True)
        to = self.folder.path / target
        if not (to / files.MANIFEST).is_file():
            files.write_manifest(scratch, **({"rolling": True} if rolling else {}))
            if files.publish(scratch, to, before_rename=lambda: self._lease.check(fresh=True)):
                return True
            if not (to / files.MANIFEST).is_file():
                raise StoreError(f"{to} is in the way: it has files but no {files.MANIFEST}. Move it away.")
        shutil.rmtree(scratch)
        return False

    def attach(self, scratch: Path, target: str, part: str) -> None:
        """Put a dropped part, made again in scratch, back into a published folder. Raises LeaseLost."""
        self._require(target)
        to = self.folder.path / target
        known = files.read_json(to / files.MANIFEST)
        made = {f"{part}/{name}": facts for name, facts in files.checksums(scratch / part).items()}
        known["files"] = {name: facts for name, facts in known["files"].items() if not name.startswith(f"{part}/")} | made
        files.sync_tree(scratch / part)
        self._lease.check(fresh=True)
        files.write_json(to / files.MANIFEST, known)  # first: as long as the part is not there, nobody reads its checksums
        os.rename(scratch / part, to / part)
        files.sync_folder(to)
        shutil.rmtree(scratch)

    def set_aside(self, target: str) -> None:
        """Take a published folder that failed verification out of its place, so that it can be made again.

        It moves to attempts/<n>/damaged-… and stays there to be looked at.
        """
        self._require(target)
        self._lease.check(fresh=True)
        into = self.path / f"damaged-{target.replace('/', '-')}-{secrets.token_hex(4)}"
        os.rename(self.folder.path / target, into)
        files.sync_folder((self.folder.path / target).parent)

    def diverge(self, tokens: int, reason: str) -> None:
        """Write diverged.json: this trajectory ends here, and that is its result."""
        self._lease.check(fresh=True)
        files.write_json(self.folder.path / "diverged.json", {"tokens": tokens, "reason": reason})

    def forget_divergence(self) -> None:
        """retry_diverged: move diverged.json into this attempt."""
        self._lease.check(fresh=True)
        try:
            os.rename(self.folder.path / "diverged.json", self.path / "retried_diverged.json")
        except FileNotFoundError:
            return
        files.sync_folder(self.folder.path)

    def progress(self, done: float, total: float, unit: str, **figures: Any) -> None:
        """Say how far it is, in progress.json: at most twice a second, and always the end."""
        now = time.monotonic()
        if now - self._progress_written < _PROGRESS_SECONDS and done < total:
            return
        self._progress_written = now
        value = {"done": done, "total": total, "unit": unit, "time": time.time(), **figures}
        files.write_json(self.path / "progress.json", _finite(value), sync=False)

    def metric(self, **figures: Any) -> None:
        """Append a line to metrics.jsonl, with the time (s since 1970). NaN and infinities become null."""
        if self._metrics is None:
            self._metrics = FileIO(self.path / "metrics.jsonl", "ab")
        line = json.dumps(_finite({"time": time.time(), **figures}), allow_nan=False)
        self._metrics.write(line.encode() + b"\n")  # one write: a kill leaves at most one torn line, the last

    def _require(self, target: str) -> None:
        if not _TARGET.get(self.folder.kind, _RESULT).fullmatch(target):
            raise ValueError(f"{self.folder}: a {self.folder.kind} has no {target!r} to publish.")


@dataclass(frozen=True)
class AttemptRecord:
    """What attempt n left behind, or is writing. Only looks, but for record_failure."""

    path: Path
    n: int

    @property
    def log(self) -> Path:
        return self.path / "log"

    def request(self) -> dict[str, Any]:
        value: dict[str, Any] = files.read_yaml(self.path / "request.yaml")
        return value

    def progress(self) -> dict[str, Any] | None:
        return _read_if_there(self.path / "progress.json")

    def failure(self) -> dict[str, Any] | None:
        """{error, traceback, time} if the attempt ended by an exception."""
        return _read_if_there(self.path / "failure.json")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without a torn last one."""
        try:
            raw = (self.path / "metrics.jsonl").read_bytes()
        except FileNotFoundError:
            return []
        whole, _, _ = raw.rpartition(b"\n")
        return [json.loads(line) for line in whole.splitlines()]

    def record_failure(self, error: str, trace: str = "") -> None:
        """For a launcher whose process died without a word (out of memory …). Replaces no failure.json."""
        if self.failure() is None:
            _write_failure(self.path, error, trace)


def _clear(path: Path) -> None:
    """Delete an attempt's temporaries."""
    if (path / _TEMPORARIES).exists():
        # Renamed first: a stopped holder that goes on must find what it publishes whole or not at all.
        os.rename(path / _TEMPORARIES, path / f"{_GONE}{secrets.token_hex(4)}")
    for gone in path.glob(f"{_GONE}*"):
        shutil.rmtree(gone, ignore_errors=True)  # what is left (NFS keeps open files) goes next time


def _write_failure(path: Path, error: str, trace: str) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    files.write_json(path / "failure.json", {"error": error, "traceback": trace, "time": now})


def _read_if_there(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = files.read_json(path)
    except FileNotFoundError:
        return None
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
