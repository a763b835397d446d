import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zexp.train import schedule

DECAYS = ("linear", "cosine", "exponential", "one_minus_sqrt")


def piece(shape, start=2e-3, end=5e-4, begin=1000, to=3000):
    return {"from": begin, "to": to, "shape": shape, "start": start, "end": end}


@pytest.mark.parametrize(
    ("shape", "at_a_quarter"),
    [
        ("linear", 0.75),
        ("cosine", (1 + math.cos(math.pi / 4)) / 2),
        ("one_minus_sqrt", 0.5),
        ("exponential", (math.exp(-1) - math.exp(-4)) / (1 - math.exp(-4))),
    ],
)
def test_each_shape_follows_its_closed_form(shape, at_a_quarter):
    assert schedule.lr([piece(shape)], 1500) == pytest.approx(5e-4 + 1.5e-3 * at_a_quarter, rel=1e-12)


@pytest.mark.parametrize("shape", DECAYS)
def test_each_shape_starts_at_its_start_and_ends_at_its_end(shape):
    for end in (0.0, 5e-4, 4e-3):
        pieces = [piece(shape, end=end)]
        assert schedule.lr(pieces, 1000) == pytest.approx(2e-3, rel=1e-12)
        assert schedule.lr(pieces, 3000) == pytest.approx(end, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("shape", DECAYS)
@given(x=st.floats(1000, 2999), dx=st.floats(0, 1000))
def test_a_decay_never_rises(shape, x, dx):
    pieces = [piece(shape, end=0.0)]
    later = min(x + dx, 3000)
    assert schedule.lr(pieces, later) <= schedule.lr(pieces, x) * (1 + 1e-12)


def test_the_pieces_of_a_wsd_join_without_a_jump():
    pieces = [
        piece("linear", 0.0, 3e-3, 0, 512),
        piece("constant", 3e-3, 3e-3, 512, 4096),
        piece("one_minus_sqrt", 3e-3, 0.0, 4096, 5120),
    ]
    assert schedule.check(pieces) == []
    assert schedule.lr(pieces, 128) == pytest.approx(0.75e-3)
    assert schedule.lr(pieces, 512) == schedule.lr(pieces, 4095) == schedule.lr(pieces, 4096) == 3e-3


def test_a_trunk_is_open_and_has_a_value_everywhere():
    trunk = [piece("constant", 3e-3, 3e-3, 0, None)]
    assert schedule.check(trunk) == []
    assert schedule.lr(trunk, 10**12) == 3e-3


def test_outside_the_pieces_there_is_no_learning_rate():
    for tokens in (999, 3001):
        with pytest.raises(ValueError, match="no piece of the schedule covers"):
            schedule.lr([piece("linear")], tokens)


@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        ([], "no pieces"),
        ([piece("cosine", to=None)], "only a constant can be"),
        ([piece("constant", end=2e-3, to=None), piece("linear")], "another piece follows"),
        ([piece("linear", to=2000), piece("linear", begin=2500)], "does not begin"),
        ([piece("linear", to=1000)], "is empty"),
        ([piece("linear", start=-1e-3)], "not negative"),
        ([piece("linear", end=math.nan)], "finite"),
        ([piece("constant")], "use linear"),
        ([piece("polynomial")], "unknown shape"),
    ],
)
def test_what_is_no_schedule_is_said_in_words(pieces, complaint):
    assert complaint in " ".join(schedule.check(pieces))


def test_only_the_constant_can_be_extended():
    assert [shape for shape in schedule.SHAPES if not schedule.needs_horizon(shape)] == ["constant"]


def test_a_schedule_names_the_numerics_that_it_uses():
    assert schedule.numerics([piece("linear"), piece("cosine"), piece("linear")]) == {
        "schedule.cosine": 1,
        "schedule.linear": 1,
    }
