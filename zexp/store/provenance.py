"""What made a result: recorded beside it, in no id."""

from __future__ import annotations

import functools
import platform
import socket
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import zexp

# What can change a number or a file format. Versions come from the installed metadata: nothing is imported.
_PACKAGES = (
    "torch", "numpy", "scipy", "safetensors", "tokenizers", "datasets", "lm-eval", "transformers",
    "hydra-core", "omegaconf", "submitit", "polars", "triton", "mamba-ssm", "causal-conv1d", "flash-attn",
    "flash-linear-attention", "liger-kernel",
)  # fmt: skip


def provenance() -> dict[str, Any]:
    """{zexp, git: {sha, dirty} | null, python, platform, hostname, packages: {name: version}, time}."""
    return {**_of_this_process(), "time": datetime.now(UTC).isoformat(timespec="seconds")}


@functools.cache
def cpu_model() -> str:
    """The name that the vendor gives this machine's CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _of_this_process() -> dict[str, Any]:
    return {
        "zexp": zexp.__version__,
        "git": _git(Path(zexp.__file__).resolve().parent.parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": socket.gethostname(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(checkout: Path) -> dict[str, Any] | None:
    if not (checkout / ".git").exists():  # installed, perhaps into the environment of another checkout
        return None
    sha = _output(checkout, "rev-parse", "HEAD")
    status = _output(checkout, "status", "--porcelain", "--untracked-files=no")
    return None if sha is None or status is None else {"sha": sha, "dirty": status != ""}


def _output(checkout: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(checkout), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
