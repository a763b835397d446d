import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from zexp.report.statistics import holm, over_items, over_seeds, paired_over_items


def test_a_mean_over_seeds_has_students_interval():
    # mean 2, s = 1, t(0.975, 2) = 4.3027 from the tables, 4.3027 / sqrt(3) = 2.4841
    interval = over_seeds([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.low == pytest.approx(2 - 2.4841, abs=1e-4)
    assert interval.high == pytest.approx(2 + 2.4841, abs=1e-4)
    assert (interval.n, interval.over) == (3, "seeds")


def test_one_seed_has_no_interval_over_seeds():
    interval = over_seeds([0.7])
    assert (interval.mean, interval.low, interval.high, interval.p) == (0.7, None, None, None)


def test_one_seeds_interval_is_over_its_items():
    # t(0.975, 10) = 2.2281
    interval = over_items(0.5, 0.1, 11)
    assert interval.low == pytest.approx(0.5 - 0.22281, abs=1e-5)
    assert (interval.n, interval.over) == (11, "items")
    assert over_items(0.5, None, 11).low is None


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=3, max_size=20))
def test_equal_weights_give_the_paired_t_test(pairs):
    ours = {str(i): (a, 1.0) for i, (a, _) in enumerate(pairs)}
    theirs = {str(i): (b, 1.0) for i, (_, b) in enumerate(pairs)}
    differences = [a - b for a, b in pairs]
    mean = math.fsum(differences) / len(differences)
    interval = paired_over_items(ours, theirs)
    assert interval is not None
    assert interval.mean == pytest.approx(mean, abs=1e-9)
    if max(differences) - min(differences) > 1e-3:  # else the p of a nearly constant difference is rounding noise
        expected = stats.ttest_rel([a for a, _ in pairs], [b for _, b in pairs])
        assert interval.p == pytest.approx(expected.pvalue, rel=1e-5, abs=1e-12)


def test_a_difference_of_ratios_weighs_items_by_their_size():
    # d = 1 at weight 1, d = 3 at weight 3: D = 10/4; residuals w(d - D) = -1.5, 1.5; se = sqrt(2 * 4.5) / 4 = 0.75
    interval = paired_over_items({"a": (2.0, 1.0), "b": (5.0, 3.0)}, {"a": (1.0, 1.0), "b": (2.0, 3.0)})
    assert interval is not None
    assert interval.mean == 2.5
    assert interval.high - interval.mean == pytest.approx(12.7062 * 0.75, rel=1e-5)  # t(0.975, 1) = 12.7062


def test_items_that_are_not_the_same_are_not_paired():
    assert paired_over_items({"a": (1.0, 1.0)}, {"b": (1.0, 1.0)}) is None
    assert paired_over_items({"a": (1.0, 1.0), "b": (1.0, 1.0)}, {"a": (1.0, 2.0), "b": (1.0, 1.0)}) is None


def test_two_equal_differences_do_not_prove_anything():
    # Two seeds of an accuracy often differ by the same count: no spread, so t would be certain. The sign test: 1/2.
    assert over_seeds([0.01, 0.01]).p == 0.5
    assert over_seeds([0.0, 0.0]).p == 1.0


def test_holm_multiplies_by_what_is_left_and_never_falls():
    # sorted .005 .01 .03 .04 times 4 3 2 1: .02 .03 .06 .04, and the last may not be below .06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_keeps_the_order_and_never_lowers_a_p(p_values):
    adjusted = holm(p_values)
    for i, raw in enumerate(p_values):
        assert raw <= adjusted[i] <= 1
        assert all(adjusted[i] <= adjusted[j] for j, other in enumerate(p_values) if raw < other)


def test_neighbours_that_share_choices_widen_a_paired_interval():
    # Each draw is an item's and its neighbour's: the mean of n/2 independent values, seen n times.
    draws = [v for v in (1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 1.0) for _ in range(2)]
    ours = {str(i): (v, 1.0) for i, v in enumerate(draws)}
    theirs = {str(i): (0.0, 1.0) for i in range(len(draws))}
    alone, near = (paired_over_items(ours, theirs, neighbours=k) for k in (0, 1))
    assert alone.mean == near.mean and near.p > alone.p
    variance = sum((v - alone.mean) ** 2 for v in draws)
    shared = sum((draws[i] - alone.mean) * (draws[i - 1] - alone.mean) for i in range(len(draws)))
    assert (near.high - near.low) / (alone.high - alone.low) == pytest.approx(math.sqrt(1 + 2 * shared / variance))
    swinging = {str(i): ((-1.0) ** i, 1.0) for i in range(10)}
    less = paired_over_items(swinging, dict.fromkeys(swinging, (0.0, 1.0)), neighbours=1)
    assert less == paired_over_items(swinging, dict.fromkeys(swinging, (0.0, 1.0))), "a negative covariance buys nothing"
