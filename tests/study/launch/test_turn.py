"""Whose turn it is, without processes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zexp.study.launch.turn import Unit, Wish, chosen, left_for

CORES = tuple(Unit(f"core-{n}") for n in range(4))


def wish(name: str, *, held: int = 0, since: float = 0.0, count: int = 1, units: tuple[Unit, ...] = CORES) -> Wish:
    return Wish(name, held, since, count, units)


wishes = st.builds(
    wish,
    st.uuids().map(str),
    held=st.integers(0, 3),
    since=st.sampled_from([0.0, 1.0, 2.0]),
    count=st.integers(1, 3),
    units=st.lists(st.sampled_from(CORES), min_size=3, unique=True).map(tuple),
)


def takes(mine: Wish, others: list[Wish], free: list[Unit]) -> list[Unit] | None:
    left = [unit for unit in left_for(mine, others, free) if unit in mine.units]
    return chosen(mine.units, left, mine.count)


@given(st.lists(wishes, min_size=1, max_size=4), st.lists(st.sampled_from(CORES), unique=True))
def test_whoever_is_first_takes_as_if_it_were_alone_and_no_two_take_the_same(asking, free):
    first = min(asking, key=lambda one: one.order)
    own = [unit for unit in first.units if unit in free]
    assert takes(first, asking, free) == chosen(first.units, [u for u in free if u in first.units], first.count)
    if len(own) >= first.count:
        assert takes(first, asking, free) is not None, "somebody gets on"


def test_the_one_that_holds_less_comes_first_then_the_one_that_waited_longer():
    free = [CORES[0]]
    rich, poor, late = wish("a", held=2), wish("b", held=1, since=5), wish("c", held=1, since=6)
    assert takes(rich, [poor, late], free) is None
    assert takes(late, [rich, poor], free) is None
    assert takes(poor, [rich, late], free) == free


def test_what_is_left_over_may_be_taken_out_of_turn():
    assert takes(wish("b", held=1), [wish("a", count=2)], list(CORES[:3])) == [CORES[2]]


def test_free_cores_are_kept_for_one_that_needs_more_of_them_than_there_are():
    wide = wish("wide", count=3)
    assert takes(wish("narrow", held=1), [wide], list(CORES[:2])) is None
    assert takes(wish("narrow", held=0, since=-1), [wide], list(CORES[:2])) == [CORES[0]], "who came before it goes first"


def test_one_is_not_held_up_by_a_wish_for_other_units():
    other = wish("a", units=CORES[2:])
    mine = wish("b", held=3, units=CORES[:2])
    assert takes(mine, [other], [CORES[0], CORES[2]]) == [CORES[0]]
    assert takes(mine, [wish("a")], [CORES[0], CORES[2]]) == [CORES[0]], "it is given what is of no use to others first"


def test_a_whole_gpu_that_another_run_waits_for_is_drained_of_its_shares():
    shares = tuple(Unit("GPU-a", n) for n in range(3))
    whole = wish("whole", units=(Unit("GPU-a"),))
    assert takes(wish("shares", held=1, units=shares), [whole], list(shares[1:])) is None
    assert takes(wish("shares", held=0, since=-1, units=shares), [whole], list(shares)) == [shares[0]]


def test_shares_exclude_the_whole_and_themselves():
    whole, first, second, other = Unit("g"), Unit("g", 0), Unit("g", 1), Unit("h", 0)
    assert whole.excludes(first) and first.excludes(whole) and first.excludes(first)
    assert not first.excludes(second) and not first.excludes(other)


def test_neighbours_are_chosen_where_there_are_any():
    assert chosen(CORES, [CORES[1], CORES[2], CORES[3]], 2) == [CORES[2], CORES[3]]
    assert chosen(CORES, [CORES[1], CORES[2]], 2) == [CORES[1], CORES[2]]
    assert chosen(CORES, [CORES[1]], 2) is None
