"""Quantised weights and the earliest-deadline table."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zexp.config.errors import ConfigError
from zexp.data.mix import PARTS, Table, quantise

weights = st.lists(st.integers(0, 200), min_size=1, max_size=7).filter(any)


@given(weights=weights, stop=st.integers(1, 3000))
@settings(deadline=None)  # Fractions are slow, and the machine may be busy
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
@settings(deadline=None)
def test_any_index_is_found_at_once(weights, item):
    table = Table(weights)
    source, index = table.source_of(item)
    assert table.counts(item)[source] == index
    assert table.counts(item + 1)[source] == index + 1


def test_a_mix_depends_on_the_ratio_alone():
    assert [Table([2048, 2048]).source_of(i) for i in range(9)] == [Table([1, 1]).source_of(i) for i in range(9)]


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=20))
@settings(deadline=None)
def test_quantised_weights_sum_to_the_period_and_are_off_by_less_than_one(weights):
    parts = quantise(weights)
    assert sum(parts) == PARTS
    for weight, part in zip(weights, parts, strict=True):
        assert abs(part - weight / sum(weights) * PARTS) < 1 + 1e-9


def test_sixty_percent_replay_is_2458_parts():
    assert quantise([0.6, 0.4]) == [2458, 1638]
    assert quantise([1, 1, 1]) == [1366, 1365, 1365]
    assert quantise([1, 0]) == [4096, 0]


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ([-1.0, 2], "mix.a.weight = -1.0: a weight is a number of at least 0."),
        ([float("nan"), 1], "mix.a.weight = nan: a weight is a number of at least 0."),
        ([0, 0.0], ("A mix cannot be read: all weights are 0 (mix.a.weight, mix.b.weight). "
                   "Give at least one source a positive weight.")),
        ([1, 1e-6], "mix.b.weight gives 1e-06 of the phase's tokens, less than half of 1/4096, the smallest share. Raise it, or set it to 0."),
    ],
)
def test_a_mix_that_makes_no_sense_is_refused(weights, text):
    with pytest.raises(ConfigError) as caught:
        quantise(weights, ["mix.a.weight", "mix.b.weight"])
    assert caught.value.problems == [text]


def test_a_mix_without_sources_is_refused():
    with pytest.raises(ConfigError, match="it has no source"):
        quantise([])
