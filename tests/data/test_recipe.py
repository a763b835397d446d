"""The blocks that are written by hand: how a key is added to them later."""

from __future__ import annotations

import pytest

from tests.data.conftest import CONFIG
from zexp.data import recipe

MINE = {"kind": "text", "documents": "line", "files": [], "counts": {"documents": 1, "bytes": 1}}
MAKE = {
    "source": lambda source: source(kind="text", files="a.txt", documents="line"),
    "split": lambda _: recipe.split(CONFIG),
    "tokenizer": lambda _: recipe.tokenizer_semantic(CONFIG, {"mine": MINE}),
    "corpus": lambda _: recipe.corpus_semantic(CONFIG, MINE, "0" * 64),
    "packing": lambda _: recipe.packing_semantic(CONFIG, "0" * 64, 64),
}


@pytest.fixture
def text(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")


def test_a_later_key_is_left_out_while_it_means_as_before_and_read_as_that(monkeypatch):
    before = {"seq_len": 64, "strategy": "concat"}
    monkeypatch.setitem(recipe.ABSENT, "packing", {"overlap": 0})
    assert recipe.as_hashed("packing", {**before, "overlap": 0}) == before
    assert recipe.as_hashed("packing", {**before, "overlap": 8}) == {**before, "overlap": 8}
    assert recipe.as_meant("packing", before) == {**before, "overlap": 0}
    assert recipe.as_meant("packing", {**before, "overlap": 8}) == {**before, "overlap": 8}


@pytest.mark.parametrize("block", recipe.ABSENT)
def test_every_block_goes_by_that_table(block, text, source, monkeypatch):
    before = MAKE[block](source)
    key = next(iter(before))
    monkeypatch.setitem(recipe.ABSENT, block, {**recipe.ABSENT[block], key: before[key]})
    after = MAKE[block](source)
    assert after == {k: v for k, v in before.items() if k != key}
    assert recipe.as_meant(block, after).items() >= before.items()


def test_no_bound_is_no_key(text, source):
    assert "max_bytes" not in source(kind="text", files="a.txt")
    assert "max_bytes" not in source(kind="text", files="a.txt", max_bytes=None)
    assert source(kind="text", files="a.txt", max_bytes="1K")["max_bytes"] == 1000
