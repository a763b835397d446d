"""How this process computes: threads, determinism, and what it does with memory that it no longer needs."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# mallopt's numbers (malloc.h) and the largest value that it takes.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_MOST = 2**31 - 1
_AHEAD = 64 << 20  # bytes by which the heap grows at a time


@contextmanager
def settled(threads: int, deterministic: bool) -> Iterator[None]:
    """The request's threads and determinism for this process; what was set before comes back. Freed memory is kept for good."""
    threads_before = torch.get_num_threads()
    deterministic_before = torch.are_deterministic_algorithms_enabled()
    filling_before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when CUDA starts
    torch.use_deterministic_algorithms(deterministic)
    # With deterministic algorithms torch fills whatever is allocated empty, at some per cent of a step: no operation here reads it
    # before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    keep_freed_memory()
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filling_before  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(deterministic_before)
        torch.set_num_threads(threads_before)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed: by default glibc gives arrays of 128 KB and more back to the system at once, and the
    next one is filled with fresh pages, at 5 to 15 % of a step on a CPU. Does nothing where the C library is another one."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_MMAP_THRESHOLD, _MOST)
        libc.mallopt(_TRIM_THRESHOLD, _MOST)
        libc.mallopt(_TOP_PAD, _AHEAD)


def give_back_memory() -> None:
    """Give what was freed and kept so far back to the system, where the C library can: what is resident then is in use."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
