"""What a process that runs stages needs before Python starts."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import zexp
from zexp.study.launch import machine

_SITE = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}


def of_stages(threads: int, code: Path | None = None) -> dict[str, str]:
    """Numbers of threads, and what of_python() says."""
    return {**dict.fromkeys(machine.THREAD_VARIABLES, str(threads)), **of_python(code)}


def of_python(code: Path | None = None) -> dict[str, str]:
    """This zexp instead of another installed one. code: a folder that holds zexp instead."""
    # The working directory is the user's: a file types.py in it must not replace Python's.
    env = {"PYTHONSAFEPATH": "1"}
    here = str(Path(zexp.__file__).parents[1]) if code is None else str(code)
    if here not in _SITE:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
    return env
