"""Items: made of held-out text alone, the same every time, with an answer that nothing but the text gives away."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zexp.config.errors import ConfigError
from zexp.config.identity import semantic
from zexp.data.documents import Document
from zexp.evaluate import builders

WORDS = ["array", "value", "object", "file", "axis", "string", "name", "matrix", "index", "path"]


def functions(n: int) -> list[Document]:
    """Held-out docstrings as zexp.data makes them."""
    made = []
    for i in range(n):
        text = f"Return the {i}th thing that is asked for, and then the {WORDS[i * i % 10]}.\n\nMore about it {i}.\n"
        made.append(
            Document(
                file=f"stdlib/m{i}.py",
                text=f"def f{i}(a, b={i}):\n{text}",
                heldout=True,
                digest=hashlib.sha256(text.encode()).digest(),
                symbol="function",
                name=f"m{i}.f{i}",
                signature=f"def f{i}(a, b={i}):",
            )
        )
    return made


def docstrings(n: int, **options: int) -> list[dict[str, Any]]:
    return builders.docstrings(functions(n), builders.Docstrings(**options))


def last_words(n: int, **options: int) -> list[dict[str, Any]]:
    return builders.last_words(functions(n), lambda word: True, builders.LastWords(**options))


@pytest.mark.parametrize("make", [docstrings, last_words])
def test_items_are_the_same_every_time_and_in_any_order_of_the_text(make: Any) -> None:
    options = builders.Docstrings() if make is docstrings else builders.LastWords()
    text = functions(60)
    build = builders.docstrings if make is docstrings else lambda t, o: builders.last_words(t, lambda w: True, o)
    assert build(text, options) == build(text[::-1], options) == make(60)


@pytest.mark.parametrize("make", [docstrings, last_words])
def test_an_item_has_one_right_choice_among_different_ones(make: Any) -> None:
    for item in make(60, choices=3):
        assert len(set(item["choices"])) == 3
        assert len({item["context"], *(c for others in item["others"] for c in others)}) > 1
        assert all(len(others) == 2 and item["context"] not in others for others in item["others"])


def test_the_answer_is_the_functions_own_docstring() -> None:
    own = {d.signature + "\n": builders._one_line(d.docstring) for d in functions(60)}
    for item in docstrings(60, bytes=1000):
        assert item["choices"][item["answer"]] == own[item["context"]]


def test_the_answers_place_says_nothing() -> None:
    places = Counter(item["answer"] for item in docstrings(600, choices=3))
    assert all(150 < places[place] < 250 for place in range(3))


def test_every_pair_of_context_and_choice_serves_as_many_items_as_there_are_choices() -> None:
    items = docstrings(50, choices=4)
    asked = {
        (context, choice)
        for item in items
        for choice, others in zip(item["choices"], item["others"], strict=True)
        for context in (item["context"], *others)
    }
    assert len(asked) == 4 * len(items)


def test_a_document_more_changes_its_own_neighbours_alone() -> None:
    before = {item["id"]: item for item in docstrings(59, items=1000)}
    after = {item["id"]: item for item in docstrings(60, items=1000)}
    assert before.keys() < after.keys()
    assert sum(after[id_] != item for id_, item in before.items()) <= 2  # before and behind it in the ring


def test_docstrings_are_cut_between_words_and_signatures_are_unique() -> None:
    twice = [*functions(20), *functions(20)]
    items = builders.docstrings(twice, builders.Docstrings(bytes=45))
    assert len(items) == 20
    for item in items:
        assert all(len(choice.encode()) <= 45 and not choice.endswith(" ") for choice in item["choices"])


def test_a_last_word_is_taken_off_its_paragraph_with_what_ends_it() -> None:
    item = last_words(60)[0]
    assert item["choices"][item["answer"]][1:] in WORDS
    assert item["context"].endswith("and then the")
    assert item["context"].startswith("def f")
    plain = [Document(d.file, d.docstring, True, d.digest) for d in functions(60)]
    without = builders.last_words(plain, lambda word: True, builders.LastWords())
    assert without[0]["context"].startswith("Return the")


def test_only_words_of_one_token_are_asked_for() -> None:
    items = builders.last_words(functions(60), lambda word: word != " value", builders.LastWords())
    assert items and all(" value" not in item["choices"] for item in items)


@given(st.lists(st.sampled_from("abcdef"), min_size=5, max_size=40), st.integers(2, 4))
def test_neighbours_in_the_ring_have_different_answers(answers: list[str], choices: int) -> None:
    ring = builders._apart([(str(n), answer) for n, answer in enumerate(answers)], choices)
    if len(ring) > choices:
        for start in range(len(ring)):
            window = [ring[(start + step) % len(ring)][1] for step in range(choices)]
            assert len(set(window)) == choices


def test_a_text_is_cut_into_whole_lines_that_give_it_back() -> None:
    text = "".join(f"line {n} of the text\n" for n in range(100))
    pieces = builders._pieces(text, 100)
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= 100 and piece.endswith("\n") for piece in pieces)
    assert builders._pieces("one very long line", 4) == ["one very long line"]


def test_recall_asks_for_a_value_that_stands_beside_the_key() -> None:
    words = [f" {a}{b}c" for a in "bdfgk" for b in "aeiou"]
    items = builders.recall(words, builders.Recall(items=20, pairs=4))
    assert items == builders.recall(words[::-1], builders.Recall(items=20, pairs=4))
    assert len({item["id"] for item in items}) == 20
    for item in items:
        *lines, asked = item["context"].split("\n")
        assert f"{asked}{item['choices'][item['answer']]}" in lines
        assert len(lines) == len(set(item["choices"])) == 4
    with pytest.raises(ValueError, match=r"needs 60 words .* there are 25"):
        builders.recall(words, builders.Recall(pairs=30))


def test_too_little_text_is_said() -> None:
    with pytest.raises(ValueError, match=r"Only 4 held-out documents .* Raise corpus.heldout"):
        docstrings(4)


def test_the_most_frequent_answer_is_right_as_often_as_it_is_an_answer() -> None:
    items = [
        {"choices": ["a", "b"], "answer": 0},
        {"choices": ["a", "c"], "answer": 0},
        {"choices": ["a", "b"], "answer": 1},
    ]
    assert builders.most_frequent(items) == pytest.approx(2 / 3)
    assert builders.most_frequent([{"choices": ["a", "b"], "answer": 0}, {"choices": ["a", "b"], "answer": 1}]) == 0.5


def test_options_are_filled_in_and_mistakes_are_said_at_once() -> None:
    options, reads = builders.check({"builder": "docstrings", "source": "x", "items": 7}, "here")
    assert options == {"builder": "docstrings", "items": 7, "choices": 2, "bytes": 120}
    assert reads == (builders.CORPUS, builders.SIGNATURES)
    with pytest.raises(ConfigError) as error:
        builders.check({"builder": "recall", "source": "x", "pair": 3, "items": 0}, "here")
    assert len(error.value.problems) == 3
    assert "here.pair: recall has no such option; it has items, pairs. Did you mean pairs?" in str(error.value)
    with pytest.raises(
        ConfigError, match=r"here\.builder = 'bpb': there is bits_per_byte, docstrings, last_words, recall"
    ):
        builders.check({"builder": "bpb"}, "here")


def test_a_later_option_stays_out_of_ids_and_is_read_as_before_whatever_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = builders.check({"builder": "recall", "items": 7}, "here")

    @dataclass(frozen=True)
    class Later(builders.Recall):
        """Its default has changed since it came: 3, where blocks without the key mean 1."""

        lines: int = semantic(3, absent=1)

    monkeypatch.setitem(builders.OPTIONS, "recall", Later)
    monkeypatch.setitem(builders.BUILDERS, "recall", partial(builders.stored, Later))
    assert builders.check({"builder": "recall", "items": 7, "lines": 1}, "here")[0] == before
    assert builders.check({"builder": "recall", "items": 7}, "here")[0] == {**before, "lines": 3}
    assert builders.BUILDERS["recall"](items=7, pairs=8) == Later(7, 8, 1)
    assert builders.BUILDERS["recall"](items=7, pairs=8, lines=3) == Later(7, 8, 3)


@pytest.mark.parametrize("name", builders.BUILDERS)
def test_options_are_read_back_from_what_is_hashed(name: str) -> None:
    options, _ = builders.check({"builder": name}, "here")
    assert builders.BUILDERS[options.pop("builder")](**options) == builders.OPTIONS[name]()


def test_a_block_that_lacks_an_option_of_its_time_is_refused() -> None:
    with pytest.raises(ValueError, match="Recall: this semantic block lacks items"):
        builders.BUILDERS["recall"](pairs=8)
