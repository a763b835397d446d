"""The device, threads and determinism under which something is measured."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from zexp.config.errors import ConfigError


def device_of(said: str | None) -> str:
    """cpu or cuda. said: auto or None, or one of these. Raises ConfigError where torch sees no GPU."""
    if said in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    if said == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = cuda: torch sees no GPU here. Use cpu or auto.")
    assert said is not None
    return said


@contextmanager
def setting(threads: int | None, *, deterministic: bool = False) -> Iterator[None]:
    """threads: of torch on the CPU, None = as they are. What was set before comes back."""
    threads_before = torch.get_num_threads()
    deterministic_before = torch.are_deterministic_algorithms_enabled()
    if threads is not None:
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when CUDA starts
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic_before)
        torch.set_num_threads(threads_before)
