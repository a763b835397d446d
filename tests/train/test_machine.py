import resource
from pathlib import Path

import pytest
import torch

from zexp.train.machine import give_back_memory, keep_freed_memory, settled


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


@pytest.mark.skipif("not __import__('sys').platform.startswith('linux')")
def test_freed_memory_is_not_asked_for_again():
    """A page that a process touches first is a minor fault; an array of 16 MB has 4,000 of them."""
    keep_freed_memory()

    def touch() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(1 << 22)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    touch()
    assert min(touch() for _ in range(5)) < 400


@pytest.mark.skipif("not __import__('sys').platform.startswith('linux')")
def test_kept_memory_can_be_given_back():
    keep_freed_memory()
    torch.ones(1 << 22)

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    before = resident()
    give_back_memory()
    assert resident() <= before - (12 << 20)
