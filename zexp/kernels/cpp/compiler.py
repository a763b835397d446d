"""The machine's C++ compiler and what decides the code that it makes. No torch."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess

# No -ffast-math: sums keep their order, NaN and infinity their meaning.
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_WIDE = "-mprefer-vector-width=512"  # x86: compilers choose half of the registers' width by themselves


def compiler() -> str | None:
    """$CXX, else g++ or clang++; None = there is none that runs (some systems have stubs of that name)."""
    own = os.environ.get("CXX")
    found = shutil.which(own) if own else shutil.which("g++") or shutil.which("clang++")
    return found if found is not None and _version(found) is not None else None


def flags() -> list[str]:
    return [*_FLAGS, *([_WIDE] if platform.machine() in ("x86_64", "AMD64") else [])]


def identity() -> str:
    """Compiler, flags and processor: the same sources under the same identity are the same machine code."""
    found = compiler()
    assert found is not None, "asked for where there is a compiler"
    return _identity(found)


@functools.cache
def _identity(path: str) -> str:
    return " · ".join((_version(path) or path, " ".join(flags()), _processor()))


@functools.cache
def _version(path: str) -> str | None:
    """The first line of what it says of itself, None = it does not run."""
    try:
        said = subprocess.run([path, "--version"], check=True, capture_output=True, text=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return said[0] if said else path


def _processor() -> str:
    """Its name, and in eight digits what -march=native looks at."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in file)}
    except FileNotFoundError:  # not Linux
        return platform.processor()
    text = " ".join(told.get(key, "") for key in ("vendor_id", "cpu family", "model", "flags", "CPU part", "Features"))
    return f"{told.get('model name', platform.machine())} ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
