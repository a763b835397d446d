import subprocess
import sys

import pytest
import torch

from zexp.train.machine import settled


def state():
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_was_set_before_comes_back_whatever_happens(deterministic):
    before = state()
    with pytest.raises(KeyError), settled(before[0] + 1, deterministic):
        assert state() == (before[0] + 1, deterministic, False)
        raise KeyError
    assert state() == before


LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
# In a process of its own, as a training is one: what a C library keeps depends on the thread and on all that was before.
SCRIPT = """
import resource
from pathlib import Path
import torch
from zexp.train.machine import give_back_memory, keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

keep_freed_memory()
before = resident()
torch.ones(1 << 23)  # 32 MB, freed at once
kept = resident()
give_back_memory()
print(kept - before, kept - resident())
"""


@LINUX
def test_freed_memory_is_kept_until_it_is_given_back():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    kept, given_back = map(int, done.stdout.split())
    assert kept >= 30 << 20 and given_back >= 30 << 20
