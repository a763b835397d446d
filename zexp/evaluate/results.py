"""From lm-eval's samples to results.json and samples.jsonl.

    results.json   {task, metrics: {name: {value, stderr, n, higher_is_better, neighbours?, chance?, baseline?: {name, value}}}, …}
    samples.jsonl  one line an item: {item, name: value}; of a ratio of sums (bits per byte) {name: [numerator, denominator]}

stderr is of the items: of a mean its standard error, of a ratio of sums the delta method's (Cochran, Sampling Techniques,
1977, eq. 6.13); null for anything else. Where neighbouring items share choices (builders.py, _matching) it counts in their
covariance, if that is positive.
Only metrics whose value is one number are reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_RATIOS = {  # of (log-likelihood in nats, weight): what it is divided by, and whether the metric is the ratio's exponential
    "bits_per_byte": (-math.log(2.0), False),
    "byte_perplexity": (-1.0, True),
    "word_perplexity": (-1.0, True),
}


def metrics_of(
    task: str,
    found: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    higher_is_better: Mapping[str, Any],
    report_as: Mapping[str, str],
    baselines: Mapping[str, Any],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(metrics of results.json, lines of samples.jsonl) of one lm-eval task.

    found: lm-eval's {"metric,filter": value}. report_as: {lm-eval's name: ours}, empty = all under their own names.
    Raises ValueError if a metric that report_as names was not computed.
    """
    values = {name.partition(",")[0]: value for name, value in _first_filter(found).items()}
    if missing := [name for name in report_as if name not in values]:
        raise ValueError(
            f"The task {task} reports {', '.join(missing)}, which lm-eval did not compute; it has {', '.join(values)}. "
            "Correct metadata.zexp.report_as in its YAML."
        )
    names = dict(report_as) or {name: name for name in values}
    first = next(iter({str(sample.get("filter", "none")): None for sample in samples}), "none")
    rows = [sample for sample in samples if str(sample.get("filter", "none")) == first]
    metrics: dict[str, Any] = {}
    lines: list[dict[str, Any]] = [{"item": item_id(sample)} for sample in rows]
    for theirs, ours in names.items():
        each = [_item_value(theirs, sample.get(theirs)) for sample in rows]
        for line, value in zip(lines, each, strict=True):
            if value is not None:
                line[ours] = value
        metrics[ours] = {
            "value": float(values[theirs]),
            "stderr": _stderr(theirs, float(values[theirs]), each, baselines.get(ours, {}).get("neighbours", 0)),
            "n": len(rows),
            "higher_is_better": bool(higher_is_better.get(theirs, True)),
            **_reference(baselines.get(ours, {})),
        }
    return metrics, lines


def item_id(sample: Mapping[str, Any]) -> str:
    """The document's own id, else lm-eval's hash of it."""
    document = sample.get("doc")
    own = document.get("id") if isinstance(document, Mapping) else None
    return str(own) if own is not None else str(sample["doc_hash"])[:16]


def _first_filter(found: Mapping[str, Any]) -> dict[str, float]:
    """Metrics (not their errors) of the filter that comes first, as lm-eval's own tables show them."""
    named = {
        name: value
        for name, value in found.items()
        if "," in name and "_stderr," not in name and isinstance(value, int | float)
    }
    filters = list(dict.fromkeys(name.partition(",")[2] for name in named))
    return {name: value for name, value in named.items() if name.partition(",")[2] == filters[0]} if filters else {}


def _item_value(metric: str, value: Any) -> float | list[float] | None:
    if metric in _RATIOS and isinstance(value, tuple | list) and len(value) == 2:
        return [float(value[0]) / _RATIOS[metric][0], float(value[1])]
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    return None


def _stderr(metric: str, value: float, each: Sequence[float | list[float] | None], neighbours: int) -> float | None:
    """neighbours: items this far apart or less, in a ring, are not independent."""
    n = len(each)
    if n < 2 or any(one is None for one in each):
        return None
    if metric in _RATIOS:
        pairs = [one for one in each if isinstance(one, list)]
        mean_weight = math.fsum(weight for _, weight in pairs) / n
        ratio = math.fsum(total for total, _ in pairs) / (n * mean_weight)
        spread = math.fsum((total - ratio * weight) ** 2 for total, weight in pairs)
        error = math.sqrt(spread / (n * (n - 1))) / mean_weight
        return value * error if _RATIOS[metric][1] else error
    numbers = [one for one in each if isinstance(one, float)]
    mean = math.fsum(numbers) / n
    if not math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12):
        return None  # not a mean of the items' values (F1, perplexity …)
    off = [one - mean for one in numbers]
    spread = math.fsum(one * one for one in off)
    shared = math.fsum(off[i] * off[i - lag] for lag in range(1, neighbours + 1) for i in range(n))
    return math.sqrt((spread + max(0.0, 2.0 * shared)) / (n * (n - 1)))


def _reference(known: Mapping[str, Any]) -> dict[str, Any]:
    """neighbours, chance and baseline as results.json has them."""
    made: dict[str, Any] = {}
    if known.get("neighbours"):
        made["neighbours"] = known["neighbours"]
    if "chance" in known:
        made["chance"] = known["chance"]
    if "baseline" in known:
        made["baseline"] = {"name": known["baseline_is"], "value": known["baseline"]}
    return made
