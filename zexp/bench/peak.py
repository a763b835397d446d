"""The most memory that this process had at a time, above what it had before."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

import torch

from zexp.train.machine import give_back_memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Counts from its making on. how: what is counted, for people."""

    def __init__(self, device: str):
        self._cuda = device == "cuda"
        gc.collect()
        if self._cuda:
            self.how = "torch's allocations on the GPU"
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._base = torch.cuda.memory_allocated()
            return
        give_back_memory()
        self._resets = _reset()
        self.how = "resident memory of the process above what it had before the model"
        if not self._resets:
            self.how += "; its greatest ever, which this system does not forget"
        self._base = _status("VmRSS") if self._resets else _greatest()

    def bytes(self) -> int:
        """The greatest value since the beginning, above that of the beginning."""
        if self._cuda:
            return torch.cuda.max_memory_allocated() - self._base
        return (_status("VmHWM") if self._resets else _greatest()) - self._base


def _reset() -> bool:
    """Have the kernel forget the greatest value; False where it cannot (it is Linux' own)."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return _STATUS.exists()


def _status(key: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _greatest() -> int:
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024
