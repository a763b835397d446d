"""Scores of one evaluated state: results.json as it is, samples.jsonl for paired comparisons.

    results.json    {"task", "metrics": {name: {"value", "stderr", "n", "higher_is_better", "neighbours"?, "chance"?, "baseline"?}}}
    samples.jsonl   one line an item, {"item": id, name: value}; a ratio of sums (bits per byte) has
                    {name: [numerator, denominator]}

neighbours: items that many lines apart or less, in a ring, are not independent; chance is a number; baseline a number
or {"name", "value"}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zexp.report.model import Cell
from zexp.report.statistics import Score, over_items, over_seeds
from zexp.store.files import read_json


@dataclass(frozen=True)
class Scored:
    """One metric of one evaluated state. items: how many questions, None if the task does not say; neighbours: see above."""

    value: float
    stderr: float | None
    items: int | None
    higher_is_better: bool
    chance: float | None
    reference: dict[str, Any] | None
    stage: str
    neighbours: int = 0


def read_results(result: Path, task: str, stage: str) -> tuple[dict[str, Scored], list[str]]:
    """The metrics of a published evaluation, as task/metric, and in words those whose value is not finite."""
    scores: dict[str, Scored] = {}
    bad: list[str] = []
    for name, metric in read_json(result / "results.json")["metrics"].items():
        key = f"{task}/{name}"
        value = metric["value"]
        if not _finite(value):
            bad.append(f"{key} is {value}")
            continue
        stderr, items = metric.get("stderr"), metric.get("n")
        scores[key] = Scored(
            value=float(value),
            stderr=float(stderr) if _finite(stderr) else None,
            items=int(items) if items is not None else None,
            higher_is_better=bool(metric["higher_is_better"]),
            chance=float(metric["chance"]) if _finite(metric.get("chance")) else None,
            reference=_reference(metric.get("baseline")),
            stage=stage,
            neighbours=int(metric.get("neighbours", 0)),
        )
    return scores, bad


def read_items(result: Path) -> dict[str, dict[str, Score]]:
    """metric -> item -> (value, weight) in the order of samples.jsonl; empty where there is none.

    An item's value is left out of a metric where it is not finite: it cannot be paired.
    """
    metrics: dict[str, dict[str, Score]] = {}
    try:
        lines = (result / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    for line in lines:
        sample = json.loads(line)
        item = str(sample["item"])
        for name, value in sample.items():
            score = _score(value)
            if name != "item" and score is not None:
                metrics.setdefault(name, {})[item] = score
    return metrics


def cell_of(by_seed: Mapping[str, Scored]) -> Cell:
    """A row's cell from its seeds' scores: over seeds where there are several, else over the one seed's items."""
    values = {seed: scored.value for seed, scored in by_seed.items()}
    one = next(iter(by_seed.values()))
    if len(values) > 1:
        interval = over_seeds(list(values.values()))
    else:
        interval = over_items(one.value, one.stderr, one.items or 0)
    return Cell(
        mean=interval.mean,
        low=interval.low,
        high=interval.high,
        n=len(values),
        higher_is_better=one.higher_is_better,
        interval=interval.over if interval.low is not None else None,
        by_seed=values,
        items=one.items,
        chance=one.chance,
        reference=one.reference,
        neighbours=one.neighbours,
        stages=[scored.stage for scored in by_seed.values()],
    )


def weighted_mean(items: Mapping[str, Score]) -> float:
    return math.fsum(v * w for v, w in items.values()) / math.fsum(w for _, w in items.values())


def _score(value: Any) -> Score | None:
    if isinstance(value, bool) or _finite(value):
        return float(value), 1.0
    if isinstance(value, list) and len(value) == 2 and all(_finite(v) for v in value) and value[1] > 0:
        return value[0] / value[1], float(value[1])
    return None


def _reference(value: Any) -> dict[str, Any] | None:
    if isinstance(value, Mapping) and _finite(value.get("value")):
        return {"name": str(value.get("name", "baseline")), "value": float(value["value"])}
    return {"name": "baseline", "value": float(value)} if _finite(value) else None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
