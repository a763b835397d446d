"""Intervals, paired comparisons and Holm's correction.

scipy.special holds the t distribution's functions that scipy.stats.t calls; importing scipy.stats itself takes over a
second, which a study whose every stage is cached would wait for. All intervals are at 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    over: what was drawn again, "seeds" or "items". n: how many of them.
    low, high: None where one draw says nothing about the spread. p: two-sided, of "the mean is 0"; None likewise.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    over: str
    p: float | None = None


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean over seeds with Student's t interval, mean ± t(0.975, n-1) · s / √n.

    Source: Student 1908, "The probable error of a mean". Raises ValueError for no values.
    """
    if not values:
        raise ValueError("a mean of no values")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, None, 1, "seeds")
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return _student(mean, math.sqrt(variance / n), n, "seeds")


def over_items(value: float, stderr: float | None, n: int) -> Interval:
    """One seed's score with the interval its items give: value ± t(0.975, n-1) · stderr."""
    if stderr is None or n < 2:
        return Interval(value, None, None, n, "items")
    return _student(value, stderr, n, "items")


def paired_over_items(
    ours: Mapping[str, Score], theirs: Mapping[str, Score], *, neighbours: int = 0, min_items: int = 2
) -> Interval | None:
    """Mean difference ours - theirs over the items both answered, with its interval over items.

    A score is (value, weight): a plain mean has weights 1, bits per byte has (bits/bytes, bytes). With weights w and
    differences d the mean is D = Σwd / Σw and its variance the ratio estimator's, n/(n-1) · Σ(w(d-D))² / (Σw)²
    (Cochran 1977, "Sampling Techniques", ch. 6); for equal weights this is the paired t test.
    neighbours: items that near to each other, in the ring that `ours` lists them in, share choices; their covariance
    counts if it is positive.
    None if fewer than `min_items` items are common, or an item has two weights (they are not the same item then).
    """
    common = ours.keys() & theirs.keys()
    if len(common) < min_items:
        return None
    differences, weights = [], []
    for item in (item for item in ours if item in common):
        (our_value, our_weight), (their_value, their_weight) = ours[item], theirs[item]
        if not math.isclose(our_weight, their_weight, rel_tol=1e-9):
            return None
        differences.append(our_value - their_value)
        weights.append(our_weight)
    n, total = len(common), math.fsum(weights)
    mean = math.fsum(w * d for w, d in zip(weights, differences, strict=True)) / total
    off = [w * (d - mean) for w, d in zip(weights, differences, strict=True)]
    shared = math.fsum(off[i] * off[i - lag] for lag in range(1, neighbours + 1) for i in range(n))
    squares = math.fsum(one * one for one in off) + max(0.0, 2.0 * shared)
    return _student(mean, math.sqrt(squares * n / (n - 1)) / total, n, "items")


Score = tuple[float, float]  # (value, weight) of one item


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that bound the chance of any false claim in the family, in the order given.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def _student(mean: float, stderr: float, n: int, over: str) -> Interval:
    from scipy.special import stdtr, stdtrit

    half = float(stdtrit(n - 1, 1 - ALPHA / 2)) * stderr
    if stderr > 0:
        p = 2 * float(stdtr(n - 1, -abs(mean) / stderr))
    else:  # t is undefined when all differences are equal (two seeds of an accuracy): the sign test's p then
        p = 1.0 if mean == 0 else 2.0 ** (1 - n)
    return Interval(mean, mean - half, mean + half, n, over, p)
