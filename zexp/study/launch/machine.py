"""What this machine can run at once, found without torch."""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from zexp.config.errors import ConfigError

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_MIG = re.compile(r"^\s+MIG .*\(UUID: (MIG-[^)]+)\)")
_GPU = re.compile(r"^GPU \d+: .*\(UUID: (GPU-[^)]+)\)")


def cores() -> int:
    """CPU cores that this process may use: its affinity, and a container's quota, rounded down."""
    known = getattr(os, "sched_getaffinity", None)  # Linux has it, macOS has not
    count = len(known(0)) if known is not None else os.cpu_count() or 1
    return max(1, math.floor(min(count, _quota())))


def _quota() -> float:
    """Cores of a cgroup v2 quota (docker --cpus=2); infinity without one."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return math.inf
    return math.inf if limit == "max" else int(limit) / int(period)


def gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """A CUDA_VISIBLE_DEVICES value for each GPU that this process may use; MIG instances count as GPUs.

    A CUDA_VISIBLE_DEVICES that is set already is taken at its word (empty: none).
    """
    preset = environ.get("CUDA_VISIBLE_DEVICES")
    if preset is not None:
        return _visible(preset)
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(listed.stdout)


def _visible(preset: str) -> list[str]:
    """CUDA's own rule: what comes after an entry that is no device is not seen."""
    found: list[str] = []
    for entry in (part.strip() for part in preset.split(",")):
        if not re.fullmatch(r"\d+|(GPU|MIG)-.+", entry):
            break
        found.append(entry)
    return found


def no_gpu() -> ConfigError:
    """What to say where execution.device=cuda and there is none."""
    return ConfigError(
        "execution.device = cuda, but this machine shows no GPU (nvidia-smi -L, CUDA_VISIBLE_DEVICES).\n"
        "  execution.device=cpu or auto trains without one."
    )


def parse_gpus(listing: str) -> list[str]:
    """The UUIDs in what `nvidia-smi -L` prints; of a GPU that is divided, those of its MIG instances.

    UUIDs, because CUDA numbers GPUs by speed and nvidia-smi by bus.
    """
    found: list[list[str]] = []
    for line in listing.splitlines():
        if match := _GPU.match(line):
            found.append([match[1]])
        elif (match := _MIG.match(line)) and found:
            found[-1].append(match[1])
    return [uuid for gpu in found for uuid in (gpu[1:] or gpu)]


def slots(device: str, threads: int, ranks: int = 1, environ: Mapping[str, str] = os.environ) -> list[str]:
    """The CUDA_VISIBLE_DEVICES of each slot: one slot for each `ranks` GPUs, else for each `ranks` · `threads` cores,
    without GPUs.

    device: auto | cpu | cuda. With cuda and no GPU the answer is empty. Raises ConfigError for fewer GPUs than ranks.
    """
    found = [] if device == "cpu" else gpus(environ)
    if 0 < len(found) < ranks:
        raise ConfigError(
            f"parallelism.data = {ranks}: each rank has a GPU of its own, and this machine shows {len(found)}.\n"
            f"  Set parallelism.data to {len(found)} or less, or execution.device=cpu."
        )
    if found or device == "cuda":
        return [",".join(found[first : first + ranks]) for first in range(0, len(found) - ranks + 1, ranks)]
    return [""] * max(1, cores() // (threads * ranks))
