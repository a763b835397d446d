"""The ledger against counting every item by hand."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.chains import L, PACKINGS, chains, child, fresh, read_so_far, replay, root
from zexp.data import order
from zexp.data.ledger import Cap, check, ledger
from zexp.data.stream import Stream


@given(chains(), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_the_ledger_is_what_a_count_of_every_item_gives(case, size):
    chain, items = case
    bins = {packing: size + position for position, packing in enumerate(PACKINGS)}
    stream = Stream(chain, bins)
    book = ledger(stream, stream.start + items * L, bins)
    parts = read_so_far(chain, items)
    read = [item for part in parts for item in part]

    assert book.tokens == len(read) * L
    assert list(book.packings) == sorted({packing for packing, *_ in read})
    for packing, account in book.packings.items():
        mine = [item for item in read if item[0] == packing]
        found = {order.locate(seed, packing, window, bins[packing])[1] for _, seed, window, _ in mine}
        assert account.tokens == len(mine) * L
        assert account.unique == len(found) * L
        assert account.repeated == (len(mine) - len(found)) * L
        assert account.replayed == sum(replayed for *_, replayed in mine) * L
        assert account.epochs == len(mine) / bins[packing]
    for segment, part in zip(book.segments, parts, strict=True):
        assert segment.tokens == len(part) * L
        assert segment.replayed == sum(replayed for *_, replayed in part) * L
        assert segment.tokens_of == {p: n * L for p, n in Counter(p for p, *_ in part).items()}


def test_the_realised_replay_fraction_is_within_one_sequence_of_the_plan():
    a = root([fresh("p", 4096)])
    b = child(a, 100, [replay(a, 2458), fresh("q", 1638)], "b")
    book = ledger(Stream([a, b]), (100 + 24) * L, {"p": 1000, "q": 1000})
    assert abs(book.segments[1].replay_fraction - 0.6) < 1 / 24
    assert book.segments[0].replay_fraction == 0


def test_reading_a_packing_past_its_cap_is_refused_with_the_numbers():
    stream = Stream([root([fresh("p", 4096)])])
    assert check(stream, 40 * L, {"p": Cap("base", bins=10, max_epochs=4, built=True)}) == []
    assert check(stream, 41 * L, {"p": Cap("base", bins=10, max_epochs=None, built=True)}) == []
    assert check(stream, 41 * L, {"p": Cap("base", bins=10, max_epochs=4, built=True)}) == [
        "source base: the run reads 328 tokens of it, which is 4.1 epochs; it has 80 tokens and max_epochs is 4. "
        "Train shorter, lower its weight, add text, or raise max_epochs (null: no cap)."
    ]
    assert "it has at most 80 tokens" in check(stream, 41 * L, {"p": Cap("base", 10, 4, built=False)})[0]


@pytest.mark.parametrize("max_epochs", [None, 4])
def test_a_source_without_one_whole_sequence_is_refused(max_epochs):
    stream = Stream([root([fresh("p", 4096)])])
    assert check(stream, L, {"p": Cap("base", 0, max_epochs, built=True)}) == [
        "source base: it has less than one sequence of 8 tokens. Give it more text, or lower seq_len."
    ]


def test_a_replay_counts_towards_the_cap():
    a = root([fresh("p", 4096)])
    b = child(a, 10, [replay(a, 2048, "beginning"), fresh("q", 2048)], "b")
    caps = {"p": Cap("p", 10, 1, True), "q": Cap("q", 10, 1, True)}
    assert [text[:9] for text in check(Stream([a, b]), (10 + 4) * L, caps)] == ["source p:"]
