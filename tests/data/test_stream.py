"""The stream of a chain against a reader that walks it, and the promises of the design."""

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.chains import (
    L,
    chains,
    child,
    fresh,
    items_of,
    read,
    read_so_far,
    replay,
    root,
)
from zexp.data.stream import Segment, Stream, Window


def windows(chain, items):
    stream = Stream(chain)
    return [stream.window(item) for item in range(items)]


def start_of(chain):
    return Stream(chain).start


@given(chains())
@settings(max_examples=150, deadline=None)
def test_every_item_is_the_one_that_a_walk_from_the_root_finds(case):
    chain, items = case
    walked = [Window(*found[:3]) for found in islice(read(chain), items)]
    assert windows(chain, items) == walked


@given(chains())
@settings(max_examples=100, deadline=None)
def test_the_spans_of_a_history_are_what_was_read(case):
    chain, items = case
    spans = [
        sorted((s.packing, s.seed, window, s.replayed) for at, s in Stream(chain).history(start_of(chain) + items * L)
               if at == position for window in range(s.first, s.stop))
        for position in range(len(chain))
    ]
    assert spans == [sorted(part) for part in read_so_far(chain, items)]


@given(chains(), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_replaying_all_is_continuing(case, more):
    chain, items = case
    fork = child(chain[-1], items, [replay(chain[-1], 4096)], "fork")
    assert windows([*chain, fork], more) == windows(chain, items + more)[items:]


@given(chains(), st.integers(0, 40), st.integers(1, 4095))
@settings(max_examples=60, deadline=None)
def test_every_arm_replays_in_the_parents_order(case, items, weight):
    chain, at = case
    fork = child(chain[-1], at, [replay(chain[-1], weight), fresh("new", 4096 - weight)], "fork")
    stream = Stream([*chain, fork])
    replayed = [w for w in (stream.window(i) for i in range(items)) if w.packing != "new"]
    assert replayed == windows(chain, at + len(replayed))[at:]


@given(chains(), st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_a_continuation_is_transparent_to_what_forks_from_it(case, first, second):
    """pretrain -> decay -> anneal reads what pretrain -> anneal reads, wherever the LR was cut."""
    chain, items = case
    cut = child(chain[-1], items, [replay(chain[-1], 4096)], "cut")
    for start in ("continue", "beginning"):
        streams = [fresh("new", 1638), fresh("p0", 458)]
        through = child(cut, first, [*streams, replay(cut, 2000, start)], "through")
        direct = child(chain[-1], items + first, [*streams, replay(chain[-1], 2000, start)], "direct")
        assert windows([*chain, cut, through], second) == windows([*chain, direct], second)


@given(chains())
@settings(max_examples=60, deadline=None)
def test_a_prefix_does_not_depend_on_the_horizon_or_on_names(case):
    chain, items = case
    renamed = [
        Segment("x" + s.id, {
            "parent": s.semantic["parent"] and {**s.semantic["parent"], "id": "x" + s.semantic["parent"]["id"]},
            "seq_len": L,
            "lr": "whatever",
            "batch": position,
            "streams": [{**e, "replay": "x" + e["replay"]} if "replay" in e else e for e in s.semantic["streams"]],
        })
        for position, s in enumerate(chain)
    ]
    assert windows(renamed, items) == windows(chain, items + 50)[:items]


def test_a_fresh_mix_goes_on_where_its_ancestors_stopped():
    a = root([fresh("p", 2048), fresh("q", 2048, seed=5)])
    b = child(a, 10, [fresh("q", 4096, seed=5)], "b")
    c = child(b, 3, [fresh("p", 4096)], "c")
    assert windows([a, b], 2) == [("q", 5, 5), ("q", 5, 6)]
    assert windows([a, b, c], 2) == [("p", 0, 5), ("p", 0, 6)]
    assert Stream([a, b, c]).consumed(13 * L + 2 * L) == {"p": 7, "q": 8}


def test_a_replay_from_the_beginning_reads_the_pretraining_data_again():
    a = root([fresh("p", 4096)])
    b = child(a, 10, [replay(a, 2048, "beginning"), fresh("q", 2048)], "b")
    assert windows([a, b], 4) == [("p", 0, 0), ("q", 0, 0), ("p", 0, 1), ("q", 0, 1)]


def test_an_item_is_located_in_its_epoch():
    stream = Stream([root([fresh("p", 4096, seed=3)])], {"p": 7})
    located = [stream.locate(item) for item in range(21)]
    for epoch in range(3):
        part = located[7 * epoch : 7 * epoch + 7]
        assert {at.epoch for at in part} == {epoch}
        assert sorted(at.bin for at in part) == list(range(7))
    assert len({tuple(at.bin for at in located[7 * e : 7 * e + 7]) for e in range(3)}) == 3


def test_far_items_are_found_without_walking():
    far = 4096 * 10**9
    a = root([fresh("p", 4095), fresh("q", 1)])
    b = child(a, far, [replay(a, 2458), fresh("q", 1638)], "b")
    stream = Stream([a, b])
    cursors = {"p": 4095 * 10**9, "q": 10**9}
    assert stream.consumed(stream.start) == cursors
    after = stream.consumed(stream.start + 4096 * L)
    assert after["q"] == cursors["q"] + 1638
    assert cursors["p"] + 2457 <= after["p"] <= cursors["p"] + 2458


@pytest.mark.parametrize(
    ("chain", "text"),
    [
        ([], "a stream needs at least the root"),
        ([root([fresh("p", 4000)])], "do not sum to 4096"),
        ([root([fresh("p", 2048), fresh("p", 2048)])], "names one stream twice"),
        ([root([fresh("p", 4096)]), root([fresh("p", 4096)], "s1")], "its parent is None, the chain has s0"),
        ([child(root([fresh("p", 4096)]), 1, [fresh("p", 4096)], "s1")], "its parent is s0, the chain has None"),
        ([root([fresh("p", 4096)]),
          Segment("s1", {"parent": {"id": "s0", "tokens": L + 1}, "seq_len": L, "streams": [fresh("p", 4096)]})],
         "inside a sequence of its parent"),
        ([root([fresh("p", 4096)]),
          Segment("s1", {"parent": {"id": "s0", "tokens": 2 * L}, "seq_len": 2 * L,
                         "streams": [{"replay": "s0", "start": "continue", "weight": 4096}]})],
         "replays sequences of 8 as 16"),
    ],
)
def test_a_chain_that_does_not_hang_together_is_refused(chain, text):
    with pytest.raises(ValueError, match=text):
        Stream(chain)


def test_items_start_at_sequence_boundaries():
    stream = Stream([root([fresh("p", 4096)])])
    assert stream.item_at(3 * L) == 3
    with pytest.raises(ValueError, match="no item boundary"):
        stream.item_at(3 * L + 1)


def test_the_helper_counts_items_as_the_stream_does():
    a = root([fresh("p", 4096)])
    assert items_of([a, child(a, 5, [fresh("p", 4096)], "b")], 0) == 5
