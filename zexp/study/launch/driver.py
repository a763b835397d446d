"""Which process drives a study: recorded in the study's folder, so that another terminal can find it and stop it.

    store/studies/<name>/driver.json   {host, boot, namespace, pid, started, command, time, log};
                                       once it is over also {ended, exit_code} or {ended, error}

A second command that drives the same study meanwhile is recorded beside it, as driver.<host>.<pid>.json.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import traceback
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zexp.store import files
from zexp.store.folder import Store
from zexp.store.process import known_dead, this_process

RECORD = "driver.json"
LOG = "driver.log"


def record(
    store: Store, study: str, words: Sequence[str], *, process: dict[str, Any] | None = None, log: Path | None = None
) -> dict[str, Any]:
    """Note who drives a study: this process, or one that it started (with the file that takes its output).

    words: of the command, without `zexp`.
    """
    made = {
        **(process or this_process()),
        "command": shlex.join(["zexp", *words]),
        "time": _now(),
        "log": str(log) if log is not None else None,
    }
    folder = store.study(study)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECORD
    before = _read(path)
    if before is not None and _alive(before):
        if _same(before, made):  # whoever started this process has noted it, with its log
            return before
        path = folder / f"driver.{made['host']}.{made['pid']}.json"
    files.write_json(path, made)
    return made


@contextlib.contextmanager
def driving(store: Store, study: str, words: Sequence[str]) -> Iterator[None]:
    """This process drives a study. An exception ends that; after a normal end the caller says ended()."""
    record(store, study, words)
    try:
        yield
    except BaseException as error:
        ended(store, study, error="".join(traceback.format_exception_only(error)).strip())
        raise


def ended(store: Store, study: str, **how: Any) -> None:
    """This process drives the study no more. how: exit_code, or error. Does nothing if it never did."""
    me = this_process()
    for path in _paths(store, study):
        known = _read(path)
        if known is None or not _same(known, me):
            continue
        if path.name == RECORD:
            files.write_json(path, {**known, "ended": _now(), **how})
        else:
            path.unlink()


def running(store: Store, study: str) -> dict[str, Any] | None:
    """The record of a process that drives the study now, or None.

    Of a process of another machine only its record is known: it counts as running until it says that it ended.
    """
    return next(iter(_running(store, study)), None)


def is_here(record: dict[str, Any]) -> bool:
    """The process runs on this machine, where it can be sent a signal."""
    me = this_process()
    return (record["boot"], record["namespace"]) == (me["boot"], me["namespace"])


def stop(store: Store, study: str) -> bool:
    """Tell what drives the study on this machine to have its stages write a state and end. False if there is nothing."""
    told = [one for one in _running(store, study) if is_here(one)]
    for one in told:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(one["pid"], signal.SIGTERM)
    return bool(told)


def _running(store: Store, study: str) -> list[dict[str, Any]]:
    return [one for path in _paths(store, study) if (one := _read(path)) is not None and _alive(one)]


def _paths(store: Store, study: str) -> list[Path]:
    folder = store.study(study)
    return [folder / RECORD, *sorted(folder.glob("driver.*.json"))]


def _alive(record: dict[str, Any]) -> bool:
    rebooted = record["host"] == socket.gethostname() and record["boot"] != this_process()["boot"]
    return "ended" not in record and not rebooted and not known_dead(record)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("host", "boot", "namespace", "pid", "started"))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = files.read_json(path)
    except FileNotFoundError:
        return None
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
