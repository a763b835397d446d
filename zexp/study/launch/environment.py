"""What a process that runs stages needs before Python starts."""

from __future__ import annotations

import os
from pathlib import Path

from zexp.config.places import import_path
from zexp.study.launch import machine


def of_stages(threads: int, code: Path | None = None) -> dict[str, str]:
    """Numbers of threads, and what of_python() says."""
    return {**dict.fromkeys(machine.THREAD_VARIABLES, str(threads)), **of_python(code)}


def of_python(code: Path | None = None) -> dict[str, str]:
    """This zexp instead of another installed one. code: a folder that holds zexp instead."""
    # The working directory is the user's: a file types.py in it must not replace Python's.
    before = os.environ.get("PYTHONPATH", "")
    path = import_path(before) if code is None else os.pathsep.join(filter(None, (str(code), before)))
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": path}
