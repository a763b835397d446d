"""Repeats in turns and in order, and what they say of a median."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zexp.bench.timing import in_order, in_turns, median_interval


def test_pieces_that_follow_one_another_keep_their_order():
    done: list[str] = []
    times = in_order({"forward": lambda: done.append("f"), "backward": lambda: done.append("b")}, seconds=0.0, least=4)
    assert done == ["f", "b"] * 5  # the first round does not count
    assert [len(one.seconds) for one in times.values()] == [4, 4]


def test_pieces_in_turns_change_their_order_every_round():
    done: list[str] = []
    in_turns({"a": lambda: done.append("a"), "b": lambda: done.append("b")}, seconds=0.0, least=4)
    assert "".join(done[2:]) == "abbaabba"


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60))
def test_the_interval_of_a_median_holds_the_median_of_the_sample(values):
    low, high = median_interval(values)
    middle = sorted(values)[len(values) // 2]
    assert min(values) <= low <= middle <= high <= max(values)


@pytest.mark.parametrize("n", [5, 6, 9, 20, 50])
def test_the_interval_misses_the_true_median_as_rarely_as_it_says(n):
    # Whether each of n values is below the true median is a fair coin; which counts of them lie outside is exact.
    from math import comb

    low, _ = median_interval(list(range(n)))
    missed = 2 * sum(comb(n, k) for k in range(int(low) + 1)) / 2**n
    assert missed <= 0.05 or low == 0
    wider = 2 * sum(comb(n, k) for k in range(int(low) + 2)) / 2**n
    assert wider > 0.05


def test_the_ranks_of_known_tables():
    # P(Binomial(10, 1/2) <= 1) = 0.0107 and P(Binomial(20, 1/2) <= 5) = 0.0207: the next ones, 0.0547 and 0.0577, are too much.
    assert median_interval(range(1, 11)) == (2, 9)
    assert median_interval(range(1, 21)) == (6, 15)
    assert Counter(median_interval(range(1, 7))) == Counter((1, 6))
