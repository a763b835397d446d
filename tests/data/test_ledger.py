"""The ledger against counting every item by hand."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.chains import (
    PACKINGS,
    L,
    chains,
    child,
    fresh,
    read_so_far,
    replay,
    root,
)
from zexp.data import order
from zexp.data.ledger import Ledger, Supply


@given(chains(), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_the_ledger_is_what_a_count_of_every_item_gives(case, size):
    chain, items = case
    bins = {packing: size + position for position, packing in enumerate(PACKINGS)}
    supplies = {packing: Supply("a " + packing, bins[packing], True, None) for packing in PACKINGS}
    book = Ledger.of(chain, tokens_at(chain, items), supplies)
    parts = read_so_far(chain, items)
    read = [item for part in parts for item in part]

    assert book.tokens == len(read) * L
    assert [account.packing for account in book.packings] == sorted({packing for packing, *_ in read})
    for account in book.packings:
        packing = account.packing
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
        assert segment.tokens_of == {"a " + p: n * L for p, n in Counter(p for p, *_ in part).items()}


def tokens_at(chain, items):
    return (chain[-1].semantic["parent"] or {"tokens": 0})["tokens"] + items * L


def test_the_realised_replay_fraction_is_within_one_sequence_of_the_plan():
    a = root([fresh("p", 4096)])
    b = child(a, 100, [replay(a, 2458), fresh("q", 1638)], "b")
    supplies = {"p": Supply("base", 1000, True, 4), "q": Supply("high", 1000, True, 4)}
    book = Ledger.of([a, b], (100 + 24) * L, supplies)
    assert abs(book.segments[1].replay_fraction - 0.6) < 1 / 24
    assert book.segments[0].replay_fraction == 0
    assert book.to_json()["segments"][1] == {
        "id": "b", "tokens": 24 * L, "replayed": 15 * L, "replay_fraction": 15 / 24,
        "sources": {"base": 15 * L, "high": 9 * L},
    }
    assert [s["name"] for s in book.to_json()["sources"]] == ["base", "high"]


def problems(supply, windows, chain=None):
    return Ledger.of(chain or [root([fresh("p", 4096)])], windows * L, {"p": supply, "q": supply}).problems()


def test_reading_a_packing_past_its_cap_is_refused_with_the_numbers():
    assert problems(Supply("base", 10, True, max_epochs=4), 40) == []
    assert problems(Supply("base", 10, True, max_epochs=None), 41) == []
    assert problems(Supply("base", 10, True, max_epochs=4), 41) == [
        ("source base: the run reads 328 tokens of it, which is 4.1 epochs; it has 80 tokens and max_epochs is 4. "
        "Train shorter, lower its weight, add text, or raise max_epochs (null: no cap).")
    ]
    assert "it has at most 80 tokens" in problems(Supply("base", 10, False, 4), 41)[0]


@pytest.mark.parametrize("max_epochs", [None, 4])
def test_a_source_without_one_whole_sequence_is_refused(max_epochs):
    assert problems(Supply("base", 0, True, max_epochs), 1) == [
        "source base: it has less than one sequence of 8 tokens. Give it more text, or lower seq_len."
    ]


def test_a_replay_counts_towards_the_cap():
    a = root([fresh("p", 4096)])
    b = child(a, 10, [replay(a, 2048, "beginning"), fresh("q", 2048)], "b")
    supplies = {"p": Supply("pp", 10, True, 1), "q": Supply("qq", 10, True, 1)}
    assert [text[:9] for text in Ledger.of([a, b], (10 + 4) * L, supplies).problems()] == ["source pp"]
