"""Quantised weights and the earliest-deadline table."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zexp.config.errors import ConfigError
from zexp.data.mix import PERIOD, Table, quantise

weights = st.lists(st.integers(0, 200), min_size=1, max_size=7).filter(any)


@given(weights=weights, stop=st.integers(1, 3000))
def test_after_any_prefix_every_source_is_within_one_item_of_its_share(weights, stop):
    table = Table(weights)
    counts = [0] * len(weights)
    for item in range(min(stop, 2 * table.period + 3)):
        source, index = table.source_of(item)
        assert index == counts[source]  # a source's items are numbered in the order of the mix
        counts[source] += 1
        assert table.counts(item + 1) == tuple(counts)
        for weight, count in zip(weights, counts, strict=True):
            assert abs(count - Fraction(weight, sum(weights)) * (item + 1)) < 1


def test_a_table_of_4096_slots_keeps_the_bound_where_many_small_sources_compete():
    weights = [4096 - 3 * 600 - 5 * 7 - 3, 600, 600, 600, 7, 7, 7, 7, 7, 3]
    table = Table(weights)
    assert table.counts(4096) == tuple(weights)
    for items in range(4097):
        for weight, count in zip(weights, table.counts(items), strict=True):
            assert abs(count * 4096 - weight * items) < 4096


@given(weights=weights, item=st.integers(0, 10**15))
def test_any_index_is_found_at_once(weights, item):
    table = Table(weights)
    source, index = table.source_of(item)
    assert table.counts(item)[source] == index
    assert table.counts(item + 1)[source] == index + 1


def test_a_mix_depends_on_the_ratio_alone():
    assert [Table([2048, 2048]).source_of(i) for i in range(9)] == [Table([1, 1]).source_of(i) for i in range(9)]


@given(st.dictionaries(st.text("abcdef", min_size=1), st.floats(0.1, 10), min_size=1, max_size=20))
def test_quantised_weights_sum_to_the_period_and_are_off_by_less_than_one(weights):
    parts = quantise(weights)
    assert sum(parts.values()) == PERIOD
    total = sum(weights.values())
    assert all(abs(parts[name] - weight / total * PERIOD) < 1 + 1e-9 for name, weight in weights.items())
    assert list(parts) == list(weights)


def test_the_replay_example_of_the_docs():
    assert quantise({"replay": 0.6, "high_quality": 0.4}) == {"replay": 2458, "high_quality": 1638}


def test_ties_do_not_depend_on_the_order_in_which_the_sources_are_written():
    assert quantise({"a": 1, "b": 1, "c": 1}) == {"c": 1365, "b": 1365, "a": 1366}


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ({"a": -1.0, "b": 2}, "mix.sources.a.weight = -1.0: a weight is a number of at least 0."),
        ({"a": float("nan")}, "mix.sources.a.weight = nan: a weight is a number of at least 0."),
        ({"a": 0, "b": 0.0}, "mix.sources has only sources of weight 0 (a, b). Give at least one source a positive weight."),
        ({}, "mix.sources has no source. Give at least one source a positive weight."),
        ({"a": 1, "b": 1e-6}, "mix.sources.b.weight = 1e-06 is 1e-06 of the mix, less than 1/4096. Raise it, or set it to 0."),
    ],
)
def test_a_mix_that_makes_no_sense_is_refused(weights, text):
    with pytest.raises(ConfigError) as caught:
        quantise(weights)
    assert caught.value.problems == [text]
