"""What this machine can run at once, found without torch."""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
_GPU = re.compile(r"^GPU \d+: (.*) \(UUID: (GPU-[^)]+)\)")
_UUID = re.compile(r"(GPU|MIG)-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def core_numbers() -> list[int]:
    """The CPU cores that this process may use: of its affinity, at most as many as a container's quota, rounded down."""
    known = getattr(os, "sched_getaffinity", None)  # Linux has it, macOS has not
    numbers = sorted(known(0)) if known is not None else list(range(os.cpu_count() or 1))
    return numbers[: max(1, math.floor(min(len(numbers), _quota())))]


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
    return [uuid for _, uuid in parse_gpus(_listing())]


def gpu_names(devices: Sequence[str], environ: Mapping[str, str] = os.environ) -> list[str]:
    """What each CUDA_VISIBLE_DEVICES entry is called on the whole machine, whoever set the variable: its UUID.

    An index is looked up in `nvidia-smi -L` where both count alike: CUDA_DEVICE_ORDER=PCI_BUS_ID, or GPUs of one model
    (CUDA numbers the fastest first). Else it stays an index, and the same GPU under its UUID counts as another one.
    """
    if all(_UUID.fullmatch(device) for device in devices):
        return list(devices)
    listing = _listing()
    whole = [(match[1], match[2]) for match in map(_GPU.match, listing.splitlines()) if match]
    uuids = [uuid for _, uuid in whole] + [uuid for _, uuid in parse_gpus(listing)]
    counted_alike = environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({model for model, _ in whole}) == 1
    names = []
    for device in devices:
        if device.isdecimal():
            known = counted_alike and int(device) < len(whole)
            names.append(whole[int(device)][1] if known else f"GPU-number-{device}")
        else:  # CUDA takes the beginning of a UUID, too
            names.append(next((uuid for uuid in uuids if uuid.startswith(device)), device))
    return names


def _listing() -> str:
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


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


def parse_gpus(listing: str) -> list[tuple[str, str]]:
    """(model, UUID) of each GPU in what `nvidia-smi -L` prints; of a GPU that is divided, those of its MIG instances.

    UUIDs, because CUDA numbers GPUs by speed and nvidia-smi by bus.
    """
    found: list[list[tuple[str, str]]] = []
    for line in listing.splitlines():
        if match := _GPU.match(line):
            found.append([(match[1], match[2])])
        elif (match := _MIG.match(line)) and found:
            found[-1].append((found[-1][0][0], match[1]))
    return [one for gpu in found for one in (gpu[1:] or gpu)]


@dataclass(frozen=True)
class Gpu:
    """name: the vendor's; memory: bytes."""

    name: str
    memory: int


def gpu_models(environ: Mapping[str, str] = os.environ) -> list[Gpu]:
    """What the GPUs are that this process may use. Empty if that is not known: no nvidia-smi, or MIG instances among them."""
    visible = gpus(environ)
    if not visible or any(one.startswith("MIG-") for one in visible):
        return []
    query = ["nvidia-smi", "--query-gpu=uuid,index,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpu_models(listed.stdout, visible)


def parse_gpu_models(listing: str, visible: list[str]) -> list[Gpu]:
    """The GPUs of `nvidia-smi --query-gpu=uuid,index,name,memory.total` (MiB) that are visible, in that order.

    Empty if one of them is not in the listing.
    """
    found: dict[str, Gpu] = {}
    for line in listing.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and fields[3].isdigit():  # "[N/A]" where memory is shared with the host
            uuid, index, name, memory = fields
            found[uuid] = found[index] = Gpu(name, int(memory) * 2**20)
    return [found[one] for one in visible] if set(visible) <= set(found) else []


@dataclass(frozen=True)
class Memory:
    """Bytes of RAM that this machine, or the container that it is, has, and what of them new processes may take now."""

    total: int
    available: int


def memory() -> Memory | None:
    """None where the kernel does not say (macOS)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        known = {key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines)}
        found = Memory(known["MemTotal"], known["MemAvailable"])
    except (OSError, KeyError, ValueError):
        return None
    limit = _memory_limit()
    return found if limit is None else Memory(min(found.total, limit.total), min(found.available, limit.available))


def _memory_limit() -> Memory | None:
    """A cgroup v2's (docker --memory=8g); its file cache counts as available. None without a limit."""
    group = Path("/sys/fs/cgroup")
    try:
        most = int((group / "memory.max").read_text())  # "max" is no number
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cache = int(stat["inactive_file"]) + int(stat["active_file"])
    except (OSError, ValueError, KeyError):
        return None
    return Memory(most, max(0, most - used + cache))
