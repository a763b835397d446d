"""Times of work on a device: the best and the median of repeats, several pieces of work in turns or in their order."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of the repeats of one piece of work, in order."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, float | int]:
        return {"best_seconds": self.best, "median_seconds": self.median, "n": len(self.seconds)}


def timed(
    work: Callable[[], object], device: torch.device | str = "cpu", *, seconds: float = 0.5, least: int = 3, most: int = 50
) -> Timing:
    """Repeats of one piece of work until `seconds` are over, at least and at most so many; one before them does not count."""
    return in_turns({"": work}, device, seconds=seconds, least=least, most=most)[""]


def in_turns(
    works: Mapping[str, Callable[[], object]],
    device: torch.device | str = "cpu",
    *,
    seconds: float = 0.5,
    least: int = 3,
    most: int = 50,
) -> dict[str, Timing]:
    """The same of several, one repeat each in turns and every other round in reverse, so that other work on the machine hits all
    of them alike. seconds: of all repeats of all of them. Raises what the work raises."""
    return _rounds(works, device, seconds, least, most, back_and_forth=True)


def in_order(
    works: Mapping[str, Callable[[], object]],
    device: torch.device | str = "cpu",
    *,
    seconds: float = 0.5,
    least: int = 3,
    most: int = 50,
) -> dict[str, Timing]:
    """The same of pieces that follow one another, as a backward pass its forward pass: every round in the order of `works`."""
    return _rounds(works, device, seconds, least, most, back_and_forth=False)


def _rounds(
    works: Mapping[str, Callable[[], object]],
    device: torch.device | str,
    seconds: float,
    least: int,
    most: int,
    *,
    back_and_forth: bool,
) -> dict[str, Timing]:
    """back_and_forth: every other round in reverse."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        once(work, device)
    end = time.monotonic() + seconds
    for turn in range(most):
        if turn >= least and time.monotonic() > end:
            break
        for name in reversed(list(works)) if back_and_forth and turn % 2 else works:
            found[name].append(once(works[name], device))
    return {name: Timing(tuple(values)) for name, values in found.items()}


def median_interval(values: Sequence[float], error: float = 0.05) -> tuple[float, float]:
    """Between which two of the values the median of what they are drawn from lies, wrongly in at most `error` of the cases,
    whatever the distribution (order statistics; David & Nagaraja 2003, section 7.1). Fewer than six values cannot say so at 5 %:
    of these it is the least and the greatest.
    """
    ordered, n = sorted(values), len(values)
    below, left_out = 0.0, 0
    while left_out < n // 2:
        below += math.comb(n, left_out) / 2**n
        if 2 * below > error:
            break
        left_out += 1
    first = max(left_out - 1, 0)
    return ordered[first], ordered[n - 1 - first]


def once(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds of one piece of work, until the device has finished it."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device | str) -> None:
    """Wait for what was started on a device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
