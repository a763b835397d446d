"""How this process computes: threads, determinism, what it keeps for a backward pass, and what it does with freed memory."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from zexp.calc import memory
from zexp.calc.layout import Layout

log = logging.getLogger(__name__)

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


def recomputes(model: Mapping[str, Any], segment: Mapping[str, Any], request: Mapping[str, Any], device: str) -> bool:
    """Whether layers keep their inputs alone and the backward pass computes the rest again: the request's activation_checkpointing.

    auto looks at the GPU's memory; on a CPU it is none, because how much of its memory is this process's is not known here.
    """
    setting = request["activation_checkpointing"]
    room = torch.cuda.mem_get_info(device)[1] if device.startswith("cuda") else None
    sizes = {"seq_len": segment["seq_len"], "micro_batch": request["micro_batch"], "precision": segment["precision"]}
    full = memory.checkpointing(setting, model, Layout(), **sizes, room=room) == "full"
    if full:
        log.info("Activations are computed again in the backward pass (parallelism.activation_checkpointing=%s).", setting)
    return full


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
