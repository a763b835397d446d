"""`detach=true` with the local launcher: the same command once more, in a session of its own that survives the terminal."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zexp.store.folder import Store, named_store
from zexp.store.process import process
from zexp.study.launch import driver, environment

_KEY = re.compile(r"(\+{1,2}|~)?detach(=.*)?")


def is_key(word: str) -> bool:
    """The word of a command sets the key `detach`."""
    return _KEY.fullmatch(word) is not None


def start(store: Store, study: str, words: Sequence[str], directory: Path) -> dict[str, Any]:
    """Start `zexp run` with these words in the background; its record. Its output goes to the study's driver.log."""
    # Also where a study's file says detach: true.
    attached = [*(word for word in words if not is_key(word)), "detach=false"]
    log = store.study(study) / driver.LOG
    with open(log, "ab") as output:
        output.write(f"$ {shlex.join(['zexp', 'run', *attached])}\n".encode())
        output.flush()
        started = subprocess.Popen(
            [sys.executable, "-m", "zexp.cli", "run", *attached],
            cwd=directory,
            env={**os.environ, **environment.of_python(), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return driver.record(store, study, ["run", *attached], process=process(started.pid), log=log)


def how_to_come_back(store: Store, study: str, record: dict[str, Any]) -> str:
    """What a person is told when the command returns."""
    name, where = shlex.quote(study), where_is(store)
    return (
        f"{study} runs in the background: process {record['pid']} on {record['host']}, which writes to {record['log']}\n"
        f"  zexp status {name} --watch{where}   how far it is\n"
        f"  zexp logs STAGE{where}   what a stage has printed\n"
        f"  zexp cancel {name}{where}   stops it at its next states; the same command goes on from there"
    )


def where_is(store: Store) -> str:
    """What other verbs need to be told to look into this store: nothing, if it is the one that they look into."""
    named = Path(named_store()).expanduser().absolute()
    return "" if named == store.root else f" --store {shlex.quote(str(store.root))}"
