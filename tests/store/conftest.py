"""Processes to kill, stop and race, and a store whose leases time out fast enough for a test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import zexp
from zexp.store.folder import StageFolder, Store
from zexp.store.ids import semantic_id
from zexp.store.lease import LeaseTimes

REPOSITORY = str(Path(zexp.__file__).parent.parent)

# What every child process begins with: folder() is the parent's stage folder, say() a line to the parent.
PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from zexp.store.errors import LeaseLost, StoreError
from zexp.store.folder import Store
from zexp.store.lease import LeaseTimes
ROOT, KIND, ID, TIMES = Path(sys.argv[1]), sys.argv[2], sys.argv[3], eval(sys.argv[4])
def folder(): return Store(ROOT, TIMES).folder(KIND, ID)
def say(text): print(text, flush=True)
def die(*_a, **_k): os.kill(os.getpid(), signal.SIGKILL)
"""


class Child:
    """A Python process with pipes. read() waits for its next line."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        self.pid = process.pid

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the child ended with {self.process.wait()}"
        return line.strip()

    def write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def wait(self) -> int:
        return self.process.wait(timeout=60)


@pytest.fixture
def start() -> Iterator[Callable[..., Child]]:
    """start(folder, code) runs code after PRELUDE in a process of its own; it is killed when the test ends."""
    children: list[subprocess.Popen[str]] = []

    def start_child(folder: StageFolder, code: str, *arguments: str) -> Child:
        times = folder.store.lease_times
        command = [sys.executable, "-c", PRELUDE + code, str(folder.store.root), folder.kind, folder.id]
        process = subprocess.Popen(
            [*command, repr(times), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": REPOSITORY},
        )
        children.append(process)
        return Child(process)

    yield start_child
    for process in children:
        process.kill()
        process.communicate()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    # A name with a space, a quote and a non-ASCII letter: no path is ever pasted into a command.
    return Store(tmp_path / "a 'störe'", LeaseTimes(heartbeat=0.1, timeout=1.5, poll=0.02))


@pytest.fixture
def make(store: Store) -> Callable[..., StageFolder]:
    """make("eval", lr=0.5) is a created folder with that semantic block."""

    def make_folder(kind: str = "eval", *, in_store: Store = store, **semantic: Any) -> StageFolder:
        folder = in_store.folder(kind, semantic_id(semantic))
        folder.create(semantic, {"zexp": "0.1.0"})
        return folder

    return make_folder
