"""The device, threads and determinism under which something is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from zexp.config.errors import ConfigError
from zexp.train.machine import settled


def device_of(said: str | None) -> str:
    """cpu or cuda. said: auto or None, or one of these. Raises ConfigError for another one, and where torch sees no GPU."""
    if said not in (None, "auto", "cpu", "cuda"):
        raise ConfigError(f"device = {said}: it is auto, cpu or cuda.")
    if said in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    if said == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = cuda: torch sees no GPU here. Use cpu or auto.")
    assert said is not None
    return said


@contextmanager
def setting(threads: int | None, *, deterministic: bool = False) -> Iterator[None]:
    """As a training sets its process. threads: of torch on the CPU, None = as they are. What was set before comes back."""
    with settled(torch.get_num_threads() if threads is None else threads, deterministic):
        yield
