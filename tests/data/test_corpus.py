"""Tokenizer, corpus, packing, windows: the stages on small text, and what a reader of bins gets."""

import copy
import json
from itertools import pairwise

import numpy as np
import pytest

from tests.data.conftest import CONFIG, write_lines
from zexp.config.errors import ConfigError
from zexp.data import corpus, documents, recipe, tokenizer, windows
from zexp.store.errors import StoreError
from zexp.store.folder import Store
from zexp.store.ids import semantic_id

LINES = [f"def function_{n}(argument): return {n * n} + argument" for n in range(200)]


@pytest.fixture
def mine(source, tmp_path):
    write_lines(tmp_path / "a.txt", LINES)
    return source(kind="text", files="a.txt", documents="line")


def config(**changes):
    return {**copy.deepcopy(CONFIG), **changes}


@pytest.fixture
def built(build, mine, store):
    """(tokenizer folder, corpus folder, packing folder) of `mine`."""

    def built(seq_len=64, source=mine, **changes):
        made = build("tokenizer", recipe.tokenizer_semantic(config(), {"mine": mine}))
        row = build("corpus", recipe.corpus_semantic(config(**changes), source, made.id))
        return made, row, build("packing", recipe.packing_semantic(config(), row.id, seq_len))

    return built


def manifest(folder):
    return json.loads((folder.result / "manifest.json").read_text())


def split_of(tokens, offsets):
    """The documents in a corpus, without their eods."""
    return [list(tokens[a + 1 : b]) for a, b in pairwise(offsets)]


def test_the_row_holds_every_training_document_behind_an_eod(built, store, mine, tmp_path):
    made, row, packed = built()
    bins = windows.open(store, packed.id)
    encoder = tokenizer.load(store, made.id)
    train = list(documents.documents(mine, 0.2, directory=tmp_path, part="train"))
    read = split_of(bins.tokens, bins.offsets)
    assert sorted(encoder.decode(ids) for ids in read) == sorted(d.text for d in train)
    assert [encoder.decode(ids) for ids in read] != [d.text for d in train]  # shuffled
    assert all(bins.tokens[at] == tokenizer.EOD_ID for at in bins.offsets)
    assert len(bins.tokens) == bins.offsets[-1] + 1

    facts = manifest(row)
    assert facts["documents"] == len(train)
    assert facts["tokens"] == len(bins.tokens) == sum(map(len, read)) + len(train) + 1
    assert facts["bytes"] == sum(len(d.text) for d in train)
    assert facts["bytes_per_token"] == facts["bytes"] / facts["tokens"]
    assert facts["dtype"] == "uint16"
    assert set(facts["files"]) == {"tokens.bin", "offsets.bin", "heldout.jsonl"}
    row.verify(row.result)


def test_the_heldout_documents_are_kept_as_text(built, store, mine, tmp_path):
    _, row, _ = built()
    held = list(corpus.read_heldout(store, row.id))
    expected = list(documents.documents(mine, 0.2, directory=tmp_path, part="heldout"))
    assert sorted(held, key=lambda d: d.text) == sorted(expected, key=lambda d: d.text)
    assert manifest(row)["heldout"] == {"documents": len(held), "bytes": sum(len(d.text) for d in held)}
    assert len(held) > 20


def test_a_window_has_its_labels_and_its_documents(built, store):
    _, row, packed = built(seq_len=64)
    bins = windows.open(store, packed.id)
    facts = manifest(packed)
    labels = manifest(row)["tokens"] - 1
    assert len(bins) == facts["bins"] == labels // 64
    assert facts["tokens"] + facts["tail"] == labels
    assert facts["tail"] < 64

    everything = []
    for bin_ in range(len(bins)):
        tokens, document = bins.read(bin_)
        assert tokens.dtype == np.int64
        assert document.dtype == np.int32
        assert len(tokens) == len(document) == 65
        assert document[0] == 0
        assert list(np.flatnonzero(np.diff(document)) + 1) == [
            at for at in range(1, 65) if tokens[at] == tokenizer.EOD_ID
        ]
        everything += list(tokens[:-1])
    assert everything == list(bins.tokens[: len(bins) * 64])
    assert bins.read(0)[0][-1] == bins.read(1)[0][0]  # stride L, read L + 1
    with pytest.raises(IndexError):
        bins.read(len(bins))


def test_a_seed_changes_the_order_and_nothing_else(built, store):
    rows = []
    for seed in (0, 1):
        _, _, packed = built(seed=seed)
        bins = windows.open(store, packed.id)
        rows.append(split_of(bins.tokens, bins.offsets))
    assert rows[0] != rows[1]
    assert sorted(rows[0]) == sorted(rows[1])


def test_max_bytes_takes_the_first_documents_of_the_shuffled_order(built, store, source, tmp_path):
    _, _, whole = built()
    _, row, some = built(source=source(kind="text", files="a.txt", documents="line", max_bytes=2000))
    whole_bins, some_bins = windows.open(store, whole.id), windows.open(store, some.id)
    first = split_of(some_bins.tokens, some_bins.offsets)
    assert first == split_of(whole_bins.tokens, whole_bins.offsets)[: len(first)]
    facts = manifest(row)
    assert 1900 < facts["bytes"] <= 2000
    assert facts["beyond_max_bytes"]["documents"] + facts["documents"] == len(whole_bins.offsets) - 1


def test_a_corpus_that_was_built_twice_is_the_same_file(built, store, tmp_path, monkeypatch):
    _, row, _ = built()
    first = manifest(row)["files"]
    row.result.rename(tmp_path / "away")
    _, again, _ = built()
    assert manifest(again)["files"] == first


def test_an_empty_corpus_is_one_eod_and_no_bin(built, store, source):
    _, row, packed = built(source=source(kind="text", files="a.txt", documents="line", max_bytes=1))
    assert manifest(row)["tokens"] == 1
    assert manifest(packed)["bins"] == 0
    assert len(windows.open(store, packed.id)) == 0


def test_an_eod_in_a_text_is_text(build, store, source, tmp_path):
    write_lines(tmp_path / "eod.txt", [f"{n} <|eod|> {n}" for n in range(50)])
    made = build("tokenizer", recipe.tokenizer_semantic(config(), {"e": source(kind="text", files="eod.txt")}))
    encoder = tokenizer.load(store, made.id)
    (ids,) = tokenizer.encode(encoder, ["a <|eod|> b"])
    assert tokenizer.EOD_ID not in ids
    assert encoder.decode(ids) == "a <|eod|> b"


@pytest.mark.parametrize("text", ["", "\0\x01 ü 漢字 🎉\r\n\t  trailing  ", "x" * 1000])
def test_any_text_comes_back_from_its_tokens(built, store, text):
    made, _, _ = built()
    encoder = tokenizer.load(store, made.id)
    (ids,) = tokenizer.encode(encoder, [text])
    assert encoder.decode(ids) == text
    assert not ids or max(ids) < 300


def test_a_tokenizer_depends_on_the_texts_alone(build, store):
    made = [tokenizer.train(iter(texts), 400).to_str() for texts in (LINES, LINES[::-1])]
    assert made[0] == made[1]


def test_the_tokenizer_says_how_many_tokens_it_found(build, source, tmp_path):
    (tmp_path / "short.txt").write_text("abcabc")
    short = source(kind="text", files="short.txt")
    made = build("tokenizer", recipe.tokenizer_semantic(config(heldout=0.0), {"s": short}))
    info = json.loads((made.result / "info.json").read_text())
    assert info == {"vocab_size": 300, "used": 260, "eod_id": 0, "sample_bytes": 6}


def test_what_is_not_built_is_said(store):
    for kind, read in (("tokenizer", tokenizer.load), ("packing", windows.open), ("corpus", corpus.result)):
        with pytest.raises(StoreError, match=f"{kind}/0000000000000000 has no result: it was never made"):
            read(Store(store.root, patience=0), "0" * 64)


def test_ids_change_with_what_matters_and_with_nothing_else(mine, source, tmp_path):
    def ids(sources=None, **changes):
        made = config(**changes)
        tok = semantic_id(recipe.tokenizer_semantic(made, sources or {"mine": mine}))
        row = semantic_id(recipe.corpus_semantic(made, mine, tok))
        return [tok, row, semantic_id(recipe.packing_semantic(made, row, 64))]

    def changed(*args, **changes):
        return [a != b for a, b in zip(ids(), ids(*args, **changes), strict=True)]

    assert changed(seed=1) == [False, True, True]
    assert changed(heldout=0.1) == [True, True, True]
    assert changed(packing={"strategy": "concat", "document_mask": False}) == [False, False, False]
    assert changed(tokenizer={**CONFIG["tokenizer"], "vocab_size": 301}) == [True, True, True]
    assert changed(tokenizer={**CONFIG["tokenizer"], "sample_bytes": 20_000}) == [False, False, False]
    bounded = source(kind="text", files="a.txt", documents="line", max_bytes=2000)
    assert changed({"mine": bounded}) == [False, False, False]  # a tokenizer samples the whole source
    assert changed({"renamed": mine}) == [False, False, False]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda s: recipe.tokenizer_semantic(config(tokenizer={**CONFIG["tokenizer"], "vocab_size": 256}), s),
         "corpus.tokenizer.vocab_size = 256: a byte-level BPE needs at least 257, the 256 bytes and <|eod|>."),
        (lambda s: recipe.tokenizer_semantic(config(tokenizer={**CONFIG["tokenizer"], "kind": "wordpiece"}), s),
         "corpus.tokenizer.kind = 'wordpiece': there are bpe and hf. Set one."),
        (lambda s: recipe.tokenizer_semantic(config(tokenizer={**CONFIG["tokenizer"], "weights": {"no": 1.0}}), s),
         "corpus.tokenizer.weights.no: no such source in corpus.sources; there is mine."),
        (lambda s: recipe.tokenizer_semantic(config(tokenizer={**CONFIG["tokenizer"], "weights": {"mine": -1.0}}), s),
         "corpus.tokenizer.weights.mine = -1.0: a weight is a number of at least 0."),
        (lambda s: recipe.tokenizer_semantic(config(), {}),
         "corpus.sources is empty: a tokenizer needs text. Name a source."),
        (lambda s: recipe.tokenizer_semantic(config(heldout=1.0), s),
         "corpus.heldout = 1.0: a share of at least 0 and below 1, e.g. 0.05."),
        (lambda s: recipe.packing_semantic(config(packing={"strategy": "best"}), "0" * 64, 64),
         "corpus.packing.strategy = 'best': there is concat. Set it."),
        (lambda s: recipe.packing_semantic(config(), "0" * 64, 0),
         "seq_len = 0: a sequence has a whole number of tokens, at least 1."),
    ],
)  # fmt: skip
def test_a_corpus_that_cannot_be_is_refused(mine, call, text):
    with pytest.raises(ConfigError) as caught:
        call({"mine": mine})
    assert caught.value.problems == [text]
