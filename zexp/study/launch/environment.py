"""What a process that runs stages needs before Python starts."""

from __future__ import annotations

import os
from pathlib import Path

from zexp.config.places import import_path
from zexp.study.launch import machine


def of_stages(threads: int, code: Path | None = None) -> dict[str, str]:
    """Numbers of threads, and this zexp instead of another installed one. code: a folder that holds zexp instead."""
    env = {name: str(threads) for name in machine.THREAD_VARIABLES}
    # The working directory is the user's: a file types.py in it must not replace Python's.
    env["PYTHONSAFEPATH"] = "1"
    before = os.environ.get("PYTHONPATH", "")
    return env | {"PYTHONPATH": import_path(before) if code is None else os.pathsep.join(filter(None, (str(code), before)))}
