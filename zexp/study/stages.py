"""One stage, in the process that does the work: its lease, its log, its handler, how it ended.

Launchers start processes and know nothing of what stages compute; handlers know nothing of processes. This is what
lies between. No torch here: handlers import what they need.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from zexp.store.attempt import Attempt
from zexp.store.errors import LeaseLost, StoreError
from zexp.store.folder import StageFolder, Store
from zexp.store.lease import LeaseTimes

# kind -> "module:function", called as function(store, folder, request, attempt) -> "done" | "diverged" | "interrupted".
# A handler publishes before it says done. SIGTERM raises Interrupted in it, unless it handles the signal itself.
HANDLERS = {
    "tokenizer": "zexp.data.tokenizer:run",
    "corpus": "zexp.data.corpus:run",
    "packing": "zexp.data.packing:run",
    "tasks": "zexp.evaluate.tasks:run",
    "segment": "zexp.train.loop:run",
    "eval": "zexp.evaluate.run:run",
}
NEED_TORCH = ("segment", "eval")

Result = Literal["done", "failed", "diverged", "interrupted"]
EXIT_CODES: dict[Result, int] = {"done": 0, "failed": 1, "diverged": 3, "interrupted": 4}

Handler = Callable[[Store, StageFolder, dict[str, Any], Attempt], str]


class Interrupted(KeyboardInterrupt):
    """SIGTERM or SIGUSR2 arrived. Not an error: the stage goes on where its last state is."""


@dataclass(frozen=True)
class Ended:
    """How a stage ended. error: one line; the traceback is in the attempt's failure.json and log."""

    result: Result
    error: str | None = None


@dataclass(frozen=True)
class Watcher:
    """Who wants to know while a stage runs. started(attempt's folder); waiting(facts of who holds the lease)."""

    started: Callable[[Path], None] = lambda path: None
    waiting: Callable[[dict[str, Any]], None] = lambda holder: None


def stage_folder(store: Store, request: Mapping[str, Any]) -> StageFolder:
    """The folder that a request names ("folder", relative to the store). Raises StoreError if it is not there."""
    kind, _, name = str(request["folder"]).partition("/")
    found = store.find(name, kind)
    if len(found) != 1:
        raise StoreError(
            f"{store.root / kind / name} has no config.yaml: stage {request['stage']} was never created, or its folder was deleted."
        )
    return found[0]


def is_done(folder: StageFolder, request: Mapping[str, Any]) -> bool:
    """The only truth about completion: what the stage makes is in its place."""
    if request["kind"] == "segment":
        to = int(request["to"])
        return (folder.trainable(to) if request.get("optimizer") else folder.state(to)) is not None
    return folder.result is not None


def divergence(folder: StageFolder, request: Mapping[str, Any]) -> str | None:
    """Why this stage cannot be reached: its trajectory diverged at or before its end. None if it did not."""
    if request["kind"] != "segment" or (said := folder.diverged()) is None or said["tokens"] > int(request["to"]):
        return None
    return f"diverged after {said['tokens']:,} tokens: {said['reason']}"


def run_stage(
    root: str | Path,
    request: dict[str, Any],
    *,
    handlers: Mapping[str, str] | None = None,
    watcher: Watcher | None = None,
    times: LeaseTimes | None = None,
) -> Ended:
    """Run one stage in this process; what it prints goes to attempts/<n>/log.

    Waits while another process holds the stage's lease, and is done when that one is. Never raises for what goes wrong
    in the stage. handlers: kinds whose handler differs from the table's. times: as everybody's who shares the store.
    """
    watcher = watcher or Watcher()
    with _interruptible():
        folder = None
        try:
            while True:
                folder = stage_folder(Store(Path(root), times or LeaseTimes()), request)
                try:
                    return _one_attempt(folder, request, {**HANDLERS, **(handlers or {})}, watcher)
                except LeaseLost as lost:  # this process slept too long: wait for whoever took over
                    print(f"{request['stage']}: {lost}", file=sys.stderr)
        except KeyboardInterrupt:
            done = folder is not None and is_done(folder, request)
            return Ended("done") if done else Ended("interrupted", "stopped by a signal")
        except Exception as error:  # the process goes on to the next stage of its job, the stage is failed
            return Ended("failed", "".join(traceback.format_exception_only(error)).strip())


def _one_attempt(folder: StageFolder, request: dict[str, Any], handlers: Mapping[str, str], watcher: Watcher) -> Ended:
    attempt = folder.attempt(
        request,
        done=lambda: is_done(folder, request),
        on_wait=lambda holder, seconds: watcher.waiting(holder),
    )
    if attempt is None:
        return Ended("done")
    with attempt:
        watcher.started(attempt.path)
        reason = divergence(folder, request)
        if reason is not None and not request.get("retry_diverged"):
            return Ended("diverged", reason)
        with _output_to(attempt.log):
            try:
                result = _handler(handlers[request["kind"]])(folder.store, folder, request, attempt)
                return _checked(result, folder, request)
            except BaseException:
                traceback.print_exc()
                raise


def _handler(reference: str) -> Handler:
    module, _, name = reference.partition(":")
    handler: Handler = getattr(importlib.import_module(module), name)
    return handler


def _checked(result: str, folder: StageFolder, request: dict[str, Any]) -> Ended:
    """What a handler says, held against the store. Raises RuntimeError if the two disagree."""
    if result == "done":
        if not is_done(folder, request):
            raise RuntimeError(f"The handler of {request['kind']} said done, but nothing is in place in {folder.path}.")
        return Ended("done")
    if result == "diverged":
        return Ended("diverged", divergence(folder, request) or "diverged")
    if result == "interrupted":
        return Ended("interrupted", "stopped by a signal, at a state")
    raise RuntimeError(f"The handler of {request['kind']} said {result!r}; it may say done, diverged or interrupted.")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """The first SIGTERM, SIGUSR2 (SLURM's warning) or SIGINT raises Interrupted in the main thread."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        # SLURM sends USR2 and TERM, perhaps to a job's every process: the second must not hit the cleaning up.
        for other in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, interrupt) for n in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Everything that this process writes to stdout and stderr, libraries in C included, goes to the end of log."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(log, "a", buffering=1, encoding="utf-8", errors="backslashreplace") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        try:
            with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
                yield
        finally:
            stream.flush()
            for number, copy in enumerate(saved, start=1):
                os.dup2(copy, number)
                os.close(copy)
