"""Which source the i-th sequence comes from: an earliest-deadline table, exact and O(1) at any index."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from functools import lru_cache

from zexp.config.errors import ConfigError

PARTS = 4096  # weights are quantised to k/4096
NUMERICS = {"data.mix": 1}


def quantise(weights: Sequence[float], names: Sequence[str] | None = None) -> list[int]:
    """Relative weights as whole 4096ths that sum to 4096, by largest remainder; ties go to the first.

    names: what to call each of them in an error (mix.sources.base.weight); without, weights[0], weights[1] ...
    Raises ConfigError, naming everything that is wrong, for no source at all, a weight that is negative or not
    finite, weights that sum to 0, and a positive weight too small for one 4096th.  A weight of 0 stays 0.
    """
    names = names or [f"weights[{position}]" for position in range(len(weights))]
    problems = [
        f"{name} = {weight!r}: a weight is a number of at least 0."
        for name, weight in zip(names, weights, strict=True)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf
    ]
    if problems:
        raise ConfigError(problems)
    total = math.fsum(weights)
    if not total > 0:
        found = f"all weights are 0 ({', '.join(names)})" if weights else "it has no source"
        raise ConfigError(f"A mix cannot be read: {found}. Give at least one source a positive weight.")
    exact = [weight / total * PARTS for weight in weights]
    parts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda position: (parts[position] - exact[position], position))
    for position in by_remainder[: PARTS - sum(parts)]:
        parts[position] += 1
    for name, weight, part in zip(names, weights, parts, strict=True):
        if weight > 0 and part == 0:
            problems.append(
                f"{name} gives {weight / total:.2g} of the phase's tokens, less than half of 1/{PARTS}, the smallest share. "
                "Raise it, or set it to 0."
            )
    if problems:
        raise ConfigError(problems)
    return parts


class Table:
    """One period of a mix.

    In period slots [0, P), source j owns w_j slots; its m-th slot lies in [floor(m P / w_j), ceil((m+1) P / w_j)):
    earliest deadline first meets all of these (Baruah et al. 1996, proportionate progress), so after any n items
    every source is within one item of n * w_j / P.  A greedy "largest deficit" rule does not keep that bound.
    """

    def __init__(self, weights: Sequence[int]):
        """weights: whole, not negative, at least one positive.  ValueError otherwise: quantise() makes them."""
        if any(isinstance(w, bool) or not isinstance(w, int) or w < 0 for w in weights) or not any(weights):
            raise ValueError(f"a mix's weights are whole numbers of at least 0, one above 0; found {list(weights)}")
        divisor = math.gcd(*weights)  # 2048:2048 is the same mix as 1:1
        self.weights = tuple(w // divisor for w in weights)
        self.period = sum(self.weights)
        self._source, self._rank = _earliest_deadline(self.weights)
        self._before: list[tuple[int, ...]] = [(0,) * len(self.weights)]
        counts = [0] * len(self.weights)
        for source in self._source:
            counts[source] += 1
            self._before.append(tuple(counts))

    def source_of(self, item: int) -> tuple[int, int]:
        """(source, index within that source) of the item-th sequence, item >= 0; O(1)."""
        periods, slot = divmod(item, self.period)
        source = self._source[slot]
        return source, periods * self.weights[source] + self._rank[slot]

    def counts(self, items: int) -> tuple[int, ...]:
        """How many of the first `items` sequences each source gives; O(sources)."""
        periods, slot = divmod(items, self.period)
        return tuple(periods * weight + before for weight, before in zip(self.weights, self._before[slot], strict=True))


@lru_cache(maxsize=256)
def table(weights: tuple[int, ...]) -> Table:
    """Table(weights), built once."""
    return Table(weights)


def _earliest_deadline(weights: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Per slot of one period: its source, and the how-manieth of that source's slots it is."""
    period = sum(weights)
    sources: list[int] = []
    ranks: list[int] = []
    waiting = [(0, source, 0) for source, weight in enumerate(weights) if weight]  # (release, source, rank)
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []  # (deadline, source, rank)
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, source, rank = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(rank + 1) * period // weights[source]), source, rank))
        deadline, source, rank = heapq.heappop(ready)
        assert deadline > slot
        sources.append(source)
        ranks.append(rank)
        if rank + 1 < weights[source]:
            heapq.heappush(waiting, ((rank + 1) * period // weights[source], source, rank + 1))
    return sources, ranks
