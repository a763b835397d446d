"""Whose turn it is when several runs want slots of one machine: a pure function of what they wish and hold.

Who holds the fewest units comes first, then who has waited longest. What is free is kept for those before one, also while
it is not enough for them yet: so a stage that needs four cores gets them although others would always take one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """A CPU core, a GPU, or a share of one: what a slot is made of."""

    device: str  # its name on the whole machine
    share: int | None = None  # the k-th share of a GPU that several stages use; None = all of it

    def excludes(self, other: Unit) -> bool:
        """One stage cannot have this unit while another one has the other."""
        return self.device == other.device and (self.share is None or other.share is None or self.share == other.share)


@dataclass(frozen=True)
class Wish:
    """A run that could start a stage now. name tells runs apart; since: when it began to wait, on the machine's clock."""

    name: str
    held: int  # units that its running stages have
    since: float
    count: int  # units that its next stage needs …
    units: tuple[Unit, ...]  # … out of these

    @property
    def order(self) -> tuple[int, float, str]:
        return (self.held, self.since, self.name)


def before(mine: Wish, others: Iterable[Wish]) -> list[Wish]:
    """The wishes whose turn is before mine, the first one first."""
    return sorted((one for one in others if one.order < mine.order), key=lambda one: one.order)


def left_for(mine: Wish, others: Iterable[Wish], free: Sequence[Unit]) -> list[Unit]:
    """Of the free units those that mine may take: what is left when each one before it has what it needs, or all there is."""
    left = list(free)
    for other in before(mine, others):
        missing = other.count
        # First what is of no use to me: the other one may take it as well.
        for unit in sorted(other.units, key=lambda unit: any(unit.excludes(own) for own in mine.units)):
            kept = [own for own in left if not unit.excludes(own)]
            if missing and len(kept) < len(left):
                left, missing = kept, missing - 1
    return left


def chosen(units: Sequence[Unit], free: Sequence[Unit], count: int) -> list[Unit] | None:
    """`count` of the free ones among all units, or None if there are not as many.

    Neighbours rather than whatever comes first: GPUs 2 and 3 rather than 1 and 2, which leaves a pair to the next one.
    """
    for first in range(0, len(units) - count + 1, count):
        block = list(units[first : first + count])
        if all(unit in free for unit in block):
            return block
    return list(free[:count]) if len(free) >= count else None
