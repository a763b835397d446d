"""Metrics, their errors and the lines for paired tests, against hand computation."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from zexp.evaluate.results import metrics_of


def samples(metric: str, values: list[Any], filter: str = "none") -> list[dict[str, Any]]:
    return [{"doc": {"id": f"i{n}"}, "filter": filter, metric: value} for n, value in enumerate(values)]


def test_a_mean_has_the_standard_error_of_its_items() -> None:
    values = [1.0, 0.0, 1.0, 1.0]
    found = {"acc,none": 0.75, "acc_stderr,none": "N/A", "alias": "mine"}
    metrics, lines = metrics_of("mine", found, samples("acc", values), {"acc": True}, {}, {"acc": {"chance": 0.5}})
    assert metrics == {
        "acc": {
            "value": 0.75,
            "stderr": pytest.approx(statistics.stdev(values) / 2),
            "n": 4,
            "higher_is_better": True,
            "chance": 0.5,
        }
    }
    assert lines == [{"item": f"i{n}", "acc": value} for n, value in enumerate(values)]


def test_a_ratio_has_its_parts_beside_each_item() -> None:
    each = [(-10.0, 8), (-30.0, 20), (-12.0, 9)]
    bits = [-logprob / math.log(2) for logprob, _ in each]
    value = sum(bits) / 37
    baseline = {"bits_per_byte": {"baseline": 3.0, "baseline_is": "unigram"}}
    metrics, lines = metrics_of(
        "bpb", {"bits_per_byte,none": value}, samples("bits_per_byte", each), {"bits_per_byte": False}, {}, baseline
    )
    assert lines[1] == {"item": "i1", "bits_per_byte": [pytest.approx(bits[1]), 20.0]}
    spread = sum((b - value * n) ** 2 for b, (_, n) in zip(bits, each, strict=True))
    assert metrics["bits_per_byte"]["stderr"] == pytest.approx(math.sqrt(spread / (3 * 2)) / (37 / 3))
    assert metrics["bits_per_byte"]["baseline"] == {"name": "unigram", "value": 3.0}
    assert metrics["bits_per_byte"]["higher_is_better"] is False


def test_a_ratio_of_equal_weights_is_a_mean() -> None:
    each = [(-3.0, 10), (-4.0, 10), (-8.0, 10)]
    rates = [-logprob / math.log(2) / 10 for logprob, _ in each]
    metrics, _ = metrics_of(
        "bpb", {"bits_per_byte,none": statistics.mean(rates)}, samples("bits_per_byte", each), {}, {}, {}
    )
    assert metrics["bits_per_byte"]["stderr"] == pytest.approx(statistics.stdev(rates) / math.sqrt(3))


def test_items_that_share_choices_widen_the_error() -> None:
    values = [1.0, 1.0, 0.0, 0.0] * 20
    alone, _ = metrics_of("t", {"acc,none": 0.5}, samples("acc", values), {}, {}, {})
    ring, _ = metrics_of("t", {"acc,none": 0.5}, samples("acc", values), {}, {}, {"acc": {"neighbours": 1}})
    assert ring["acc"]["stderr"] == pytest.approx(alone["acc"]["stderr"])  # each equal neighbour has an unequal one
    runs = sorted(values)
    ring, _ = metrics_of("t", {"acc,none": 0.5}, samples("acc", runs), {}, {}, {"acc": {"neighbours": 1}})
    assert ring["acc"]["stderr"] == pytest.approx(alone["acc"]["stderr"] * math.sqrt(1 + 2 * 76 / 80))


def test_what_is_no_mean_of_its_items_has_no_error() -> None:
    metrics, _ = metrics_of("t", {"f1,none": 0.9}, samples("f1", [1.0, 0.0]), {}, {}, {})
    assert metrics["f1"]["stderr"] is None
    metrics, lines = metrics_of("t", {"mcc,none": 0.9}, samples("mcc", [(1, 0), (1, 1)]), {}, {}, {})
    assert metrics["mcc"]["stderr"] is None and lines == [{"item": "i0"}, {"item": "i1"}]


def test_the_first_filter_counts_and_metrics_can_be_renamed() -> None:
    rows = samples("exact", [1.0, 0.0], "strict") + samples("exact", [1.0, 1.0], "loose")
    found = {"exact,strict": 0.5, "exact,loose": 1.0}
    metrics, lines = metrics_of("t", found, rows, {}, {"exact": "acc"}, {})
    assert list(metrics) == ["acc"] and metrics["acc"]["value"] == 0.5
    assert len(lines) == 2
    with pytest.raises(ValueError, match="reports speed, which lm-eval did not compute; it has exact"):
        metrics_of("t", found, rows, {}, {"speed": "acc"}, {})
