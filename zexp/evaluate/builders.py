"""How the documents of a task are made from held-out text: pure functions of that text, their options and nothing else.

Which documents are taken, and in which order, goes by hashes of their contents, so a document more moves no other.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from zexp.config.errors import ConfigError
from zexp.config.identity import absents, table_dict
from zexp.evaluate import names

if TYPE_CHECKING:
    from zexp.data.documents import Document

# What a builder reads: the held-out documents of a corpus, their signatures, the tokenizer.
CORPUS, SIGNATURES, TOKENIZER = "corpus", "signatures", "tokenizer"
Item = dict[str, Any]


@dataclass(frozen=True)
class BitsPerByte:
    """Pieces of held-out documents, cut at line ends."""

    pieces: int = 64  # at most
    bytes: int = 768  # of UTF-8, at most, but for a longer line

    READS = (CORPUS, TOKENIZER)


@dataclass(frozen=True)
class Docstrings:
    """Functions and classes, each with its own docstring and others to choose from."""

    items: int = 600  # at most
    choices: int = 2
    bytes: int = 120  # of a docstring, at most; cut between words

    READS = (CORPUS, SIGNATURES)


@dataclass(frozen=True)
class LastWords:
    """First paragraphs without their last word, with words to choose from."""

    items: int = 400  # at most
    choices: int = 4
    bytes: int = 240  # of signature and text together, at most

    READS = (CORPUS, TOKENIZER)


@dataclass(frozen=True)
class Recall:
    """Key–value pairs, and one of the keys again."""

    items: int = 128
    pairs: int = 8

    READS = (TOKENIZER,)


Options = BitsPerByte | Docstrings | LastWords | Recall
T = TypeVar("T")


def stored(cls: type[T], **options: Any) -> T:
    """Options from a semantic block: a key that it lacks is its `absent` value, never the default.

    An option that is added later is declared `name: int = semantic(default, absent=value)`, see zexp.config.identity.
    Raises ValueError for a key that the block must have.
    """
    absent = absents(cls)
    lacks = [f.name for f in fields(cls) if f.name not in options and f.name not in absent]  # type: ignore[arg-type]
    if lacks:
        raise ValueError(f"{cls.__name__}: this semantic block lacks {', '.join(lacks)}.")
    return cls(**(absent | options))


OPTIONS: dict[str, type[Options]] = {
    "bits_per_byte": BitsPerByte,
    "docstrings": Docstrings,
    "last_words": LastWords,
    "recall": Recall,
}
# Builder -> its options from what a semantic block says besides the builder's name, as keyword arguments.
BUILDERS: dict[str, Callable[..., Options]] = {name: partial(stored, cls) for name, cls in OPTIONS.items()}
# Raised when the same options and text give other items.
NUMERICS = {"tasks.bits_per_byte": 1, "tasks.docstrings": 1, "tasks.last_words": 1, "tasks.recall": 1}
SMALLEST = {"choices": 2, "pairs": 2}  # every other option: 1


def check(asked: dict[str, Any], where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(options with every default filled in, what the builder reads) of a YAML's metadata.zexp.documents.

    Options that equal their `absent` value are left out, see `stored`.
    `source` is not among the options: it is the corpus whose id stands beside them. where: what to call it in an error.
    Raises ConfigError with every unknown key and wrong number.
    """
    name = asked.get("builder")
    if name not in OPTIONS:
        raise ConfigError(f"{where}.builder = {name!r}: there is {', '.join(OPTIONS)}.")
    builder = OPTIONS[name]
    known = [f.name for f in fields(builder)]
    options: dict[str, Any] = {}
    problems = []
    for key, value in asked.items():
        if key in ("builder", "source"):
            continue
        if key not in known:
            close = names.near(key, known)
            meant = f" Did you mean {close[0]}?" if close else ""
            problems.append(f"{where}.{key}: {name} has no such option; it has {', '.join(known)}.{meant}")
        elif not isinstance(value, int) or isinstance(value, bool) or value < SMALLEST.get(key, 1):
            problems.append(f"{where}.{key} = {value!r}: a whole number of at least {SMALLEST.get(key, 1)}.")
        else:
            options[key] = value
    if "source" in asked and CORPUS not in builder.READS:
        problems.append(f"{where}.source is set, but {name} reads no source. Take it out.")
    if problems:
        raise ConfigError(problems)
    return {"builder": name, **table_dict(builder(**options))}, builder.READS


def numerics(builder: str) -> dict[str, int]:
    """The numerics number of a builder."""
    return {f"tasks.{builder}": NUMERICS[f"tasks.{builder}"]}


def bits_per_byte(heldout: Iterable[Document], options: BitsPerByte) -> list[Item]:
    """{id, text}."""
    pieces = {piece for document in heldout for piece in _pieces(document.text, options.bytes) if piece.strip()}
    return [{"id": _id(text), "text": text} for text in _chosen(pieces, options.pieces)]


def docstrings(heldout: Iterable[Document], options: Docstrings) -> list[Item]:
    """{id, context: a signature, choices: docstrings, answer, others}: see _matching.

    Signatures and docstrings are put on one line. Left out: signatures above 120 characters, docstrings under 40, and what
    has the signature or the docstring of another.
    """
    pairs: dict[str, str] = {}
    for document in heldout:
        if document.symbol not in ("function", "class"):
            continue
        signature, text = _one_line(document.signature), _cut(_one_line(document.docstring), options.bytes)
        if len(signature) <= 120 and len(text) >= 40:
            pairs.setdefault(signature, text)
    unique: dict[str, str] = {}
    for signature, text in sorted(pairs.items()):
        unique.setdefault(text, signature)
    matches = [(f"{unique[text]}\n", text) for text in _chosen(unique, options.items)]
    return _matching(matches, options.choices)


def last_words(heldout: Iterable[Document], is_one_token: Any, options: LastWords) -> list[Item]:
    """{id, context: a docstring's first paragraph without its last word, choices: words, answer, others}: see _matching.

    is_one_token: str -> bool, of ' word'. Left out: last words with other characters than letters, or of more than one token
    (a model would have to be asked once for each, and not only once for all), and paragraphs under 20 characters.
    A document without a signature (a source of one's own) has its text alone.
    """
    found: dict[str, str] = {}
    for document in heldout:
        paragraph = _one_line((document.docstring or document.text).strip().split("\n\n")[0])
        match = re.search(r"^(.{20,}) ([A-Za-z]+)[.:!?)\"'`]*$", paragraph)
        if match is None or not is_one_token(f" {match[2]}"):
            continue
        before = f"{_one_line(document.signature)}\n{match[1]}" if document.signature else match[1]
        if len(before.encode()) <= options.bytes:
            found.setdefault(before, f" {match[2]}")
    matches = [(before, found[before]) for before in _chosen(found, options.items)]
    return _matching(_apart(matches, options.choices), options.choices)


def recall(words: Sequence[str], options: Recall) -> list[Item]:
    """{id, context, choices: the values, answer}.

    words: ' word', one token each. Raises ValueError if they are too few for one item's keys and values.
    """
    if len(words) < 2 * options.pairs:
        raise ValueError(
            f"recall with {options.pairs} pairs needs {2 * options.pairs} words that are one token of the tokenizer, and there "
            f"are {len(words)}. Take recall out of eval.tasks, or use a larger corpus.tokenizer.vocab_size."
        )
    words = sorted(words, key=_rank)
    items = []
    for n in range(options.items):
        draw = random.Random(n)
        chosen = draw.sample(words, 2 * options.pairs)
        keys, values = chosen[: options.pairs], chosen[options.pairs :]
        answer = draw.randrange(options.pairs)
        lines = "".join(f"{key.strip()}:{value}\n" for key, value in zip(keys, values, strict=True))
        context = f"{lines}{keys[answer].strip()}:"
        items.append({"id": _id(context), "context": context, "choices": values, "answer": answer})
    return items


def most_frequent(items: Sequence[Item]) -> float:
    """Accuracy of choosing, in every item, the choice that is most often an answer; a tie counts in part."""
    answers = Counter(item["choices"][item["answer"]] for item in items)
    right = 0.0
    for item in items:
        best = max(answers[choice] for choice in item["choices"])
        tied = [choice for choice in item["choices"] if answers[choice] == best]
        right += (item["choices"][item["answer"]] in tied) / len(tied)
    return right / len(items)


def _matching(matches: Sequence[tuple[str, str]], choices: int) -> list[Item]:
    """Items in a ring: item i has the contexts' i-th, and the answers i, i+1 … i+k-1 to choose from.

    others[c]: the contexts that p(choice c) is averaged over, beside the item's own: those of the other items that have
    this choice too, so that every (context, choice) is asked for by several items and computed once: k for an item.
    """
    n = len(matches)
    if n <= 2 * choices:
        raise ValueError(
            f"Only {n} held-out documents are fit for this task, and it needs more than {2 * choices}. "
            "Raise corpus.heldout, or take the task out of eval.tasks."
        )
    items = []
    for i, (context, own) in enumerate(matches):
        ring = [(i + step) % n for step in range(choices)]
        random.Random(_id(context + own)).shuffle(ring)  # the answer's place says nothing
        items.append(
            {
                "id": _id(context + own),
                "context": context,
                "choices": [matches[j][1] for j in ring],
                "answer": ring.index(i),
                "others": [[matches[x % n][0] for x in range(j - choices + 1, j + 1) if x % n != i] for j in ring],
            }
        )
    return items


def _apart(matches: Sequence[tuple[str, str]], choices: int) -> list[tuple[str, str]]:
    """The same in an order in which any `choices` neighbours of the ring have different answers.

    What cannot be placed (one word has too large a share) is left out.
    """
    waiting = list(matches)
    placed: list[tuple[str, str]] = []
    while waiting:
        recent = {answer for _, answer in placed[-(choices - 1) :]}
        following = next((k for k, (_, answer) in enumerate(waiting) if answer not in recent), None)
        if following is None:
            break
        placed.append(waiting.pop(following))
    while len(placed) > choices and _meets(placed, choices):
        placed.pop()
    return placed


def _meets(ring: Sequence[tuple[str, str]], choices: int) -> bool:
    """Whether equal answers are neighbours across the ring's seam."""
    seam = [answer for _, answer in [*ring[-(choices - 1) :], *ring[: choices - 1]]]
    return any(len(set(seam[k : k + choices])) < choices for k in range(len(seam) - choices + 1))


def _pieces(text: str, size: int) -> list[str]:
    """A text in pieces of whole lines, each as long as it can be up to `size` bytes."""
    pieces: list[str] = []
    piece, length = "", 0
    for line in text.splitlines(keepends=True):
        line_bytes = len(line.encode())
        if piece and length + line_bytes > size:
            pieces.append(piece)
            piece, length = "", 0
        piece += line
        length += line_bytes
    return [*pieces, piece] if piece else pieces


def _chosen(texts: Iterable[str], most: int) -> list[str]:
    """The first `most` of distinct texts in the order of their hashes."""
    return sorted(set(texts), key=_rank)[:most]


def _rank(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _id(text: str) -> str:
    """An item's id: of its contents, so the same item has the same id in any task."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cut(text: str, size: int) -> str:
    """At most `size` bytes of text, cut between words."""
    data = text.encode()
    if len(data) <= size:
        return text
    cut = data[: size + 1].decode(errors="ignore")
    return cut.rpartition(" ")[0] or cut
