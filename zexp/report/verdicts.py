"""Each row against its baseline: what the study's evidence allows to say.

A row's baseline is the row that has the baseline's values on the axes that study.baseline names and its own values on
all others. Holm's correction runs over every comparison of the study, on all metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zexp.report.model import Pair, Row
from zexp.report.scores import weighted_mean
from zexp.report.statistics import ALPHA, Interval, Score, holm, over_seeds, paired_over_items

BETTER, WORSE, UNDECIDED = "better", "worse", "cannot distinguish"
ONE_SEED = "one seed: items only, so another seed may turn it"

ItemsOf = Callable[[str, str], Mapping[str, Score]]  # (eval stage, metric of the task) -> item -> score
Difference = Callable[[set[str]], str]  # what differs between numerics fingerprints, in words; empty for nothing


def compare(
    rows: Sequence[Row], baseline: Mapping[str, Any], items_of: ItemsOf, difference: Difference
) -> tuple[list[Pair], list[str]]:
    """A Pair per row with a baseline and metric that either has, and in words what could not be compared at all."""
    if not baseline:
        return [], []
    variants = [row for row in rows if not row.pretrained]
    problems: list[str] = []
    pairs: list[Pair] = []
    fixed = {axis: str(value) for axis, value in baseline.items()}
    by_axes = {_key(row.axes): row for row in variants}
    for axis in fixed:
        if variants and not any(axis in row.axes for row in variants):
            problems.append(f"study.baseline names the axis {axis}, which no variant has; nothing is compared.")
    if problems:
        return [], problems
    for row in variants:
        if all(str(row.axes.get(axis)) == value for axis, value in fixed.items()):
            continue
        other = by_axes.get(_key({**row.axes, **fixed}))
        if other is None:
            problems.append(f"{row.name} has no baseline: no variant is {_say({**row.axes, **fixed})}.")
            continue
        names = [name for name in row.metrics if name in other.metrics]
        if not names:
            problems.append(f"{row.name} is not compared with {other.name}: no metric was scored for both yet.")
        mixed = bool(difference({*row.fingerprints, *other.fingerprints}))
        pairs += [_pair(row, other, name, items_of, mixed) for name in names]
    _decide(pairs)
    return pairs, problems


def _pair(row: Row, other: Row, metric: str, items_of: ItemsOf, mixed: bool) -> Pair:
    ours, theirs = row.metrics[metric], other.metrics[metric]
    pair = Pair(row.name, other.name, metric, UNDECIDED, ours.higher_is_better, mixed_fingerprints=mixed)
    seeds = [seed for seed in ours.by_seed if seed in theirs.by_seed]
    if not seeds:
        pair.reason = "no seed is done in both"
        return pair
    interval: Interval | None
    if len(seeds) == 1:
        interval = _over_items(row, other, metric, seeds[0], items_of)
        if interval is None:
            pair.difference, pair.n = ours.by_seed[seeds[0]] - theirs.by_seed[seeds[0]], 1
            pair.reason = "one seed, and the two did not score the same items"
            return pair
        pair.reason = ONE_SEED
    else:
        interval = over_seeds([ours.by_seed[seed] - theirs.by_seed[seed] for seed in seeds])
        left_out = sorted({*ours.by_seed, *theirs.by_seed} - set(seeds))
        if left_out:
            pair.reason = f"over the seeds that both have; without {', '.join(left_out)}"
    pair.difference, pair.low, pair.high = interval.mean, interval.low, interval.high
    pair.interval, pair.n, pair.p = interval.over, interval.n, interval.p
    return pair


def _over_items(row: Row, other: Row, metric: str, seed: str, items_of: ItemsOf) -> Interval | None:
    task, _, name = metric.rpartition("/")
    scores: list[Mapping[str, Score]] = []
    for one in (row, other):
        stage, cell = one.evals.get(seed, {}).get(task), one.metrics[metric]
        items = items_of(stage, name) if stage is not None else {}
        # Items that do not add up to the score are of something else (a weight left out), and are not paired.
        if not items or not math.isclose(weighted_mean(items), cell.by_seed[seed], rel_tol=1e-4, abs_tol=1e-9):
            return None
        scores.append(items)
    if scores[0].keys() != scores[1].keys():
        return None
    return paired_over_items(scores[0], scores[1], neighbours=row.metrics[metric].neighbours)


def _decide(pairs: Sequence[Pair]) -> None:
    tested = [pair for pair in pairs if pair.p is not None]
    for pair, adjusted in zip(tested, holm([pair.p for pair in tested if pair.p is not None]), strict=True):
        assert pair.difference is not None
        pair.p_holm = adjusted
        if adjusted < ALPHA:
            pair.verdict = BETTER if (pair.difference > 0) == pair.higher_is_better else WORSE


def fingerprint_warnings(rows: Sequence[Row], pairs: Sequence[Pair], say: Difference) -> list[str]:
    """Rows and comparisons that were trained under several numerics fingerprints, with what differs."""
    warnings = []
    for row in rows:
        if differs := say(set(row.fingerprints)):
            warnings.append(f"{row.name} was trained under several numerics fingerprints ({differs}).")
    seen: set[tuple[str, str]] = set()
    by_name = {row.name: row for row in rows if not row.pretrained}
    for pair in pairs:
        if pair.mixed_fingerprints and (pair.row, pair.baseline) not in seen:
            seen.add((pair.row, pair.baseline))
            both = {*by_name[pair.row].fingerprints, *by_name[pair.baseline].fingerprints}
            warnings.append(
                f"{pair.row} and {pair.baseline} were trained under different numerics fingerprints ({say(both)})."
            )
    return warnings


def _key(axes: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((axis, str(value)) for axis, value in axes.items()))


def _say(axes: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis}={value}" for axis, value in axes.items())
