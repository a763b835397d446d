"""A small corpus of local text, built once for all tests by zexp.data's own stages."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from zexp.store.folder import StageFolder, Store
from zexp.store.ids import semantic_id

# A busy machine is no failure; CI tries the same examples each time, everybody else new ones.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session", autouse=True)
def slots_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests launch shares the machine with nobody, and with no other test process."""
    os.environ["ZEXP_SLOTS_DIR"] = str(tmp_path_factory.mktemp("slots"))


Handler = Callable[[Store, StageFolder, dict[str, Any], Any], str]


@dataclass(frozen=True)
class TinyCorpus:
    """Where it lies, and what a segment names: the tokenizer's id and a packing's id by source name."""

    root: Path
    tokenizer: str
    packings: dict[str, str]
    vocab_size: int = 300
    seq_len: int = 32


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    """Two sources of 40 KB of made-up text each, `base` and `better`, packed to sequences of 32."""
    from zexp.data import corpus, packing, recipe, tokenizer

    directory = tmp_path_factory.mktemp("text")
    root = tmp_path_factory.mktemp("tiny") / "store"
    store = Store(root)
    config = {
        "tokenizer": {"kind": "bpe", "vocab_size": TinyCorpus.vocab_size, "sample_bytes": "1M", "weights": None},
        "packing": {"strategy": "concat", "document_mask": True},
        "heldout": 0.05,
        "seed": 0,
    }
    sources = {}
    for seed, name in enumerate(("base", "better")):
        (directory / f"{name}.txt").write_text(made_up_text(seed, 40_000))
        source = {"kind": "text", "files": f"{name}.txt", "documents": "paragraph"}
        sources[name] = recipe.source_semantic(name, source, store_root=root, directory=directory)
    request = {"threads": 1, "directory": str(directory)}
    tokenizer_id = build(store, "tokenizer", recipe.tokenizer_semantic(config, sources), tokenizer.run, request)
    packings = {}
    for name, source in sources.items():
        corpus_id = build(store, "corpus", recipe.corpus_semantic(config, source, tokenizer_id), corpus.run, request)
        semantic = recipe.packing_semantic(config, corpus_id, TinyCorpus.seq_len)
        packings[name] = build(store, "packing", semantic, packing.run, request)
    return TinyCorpus(root, tokenizer_id, packings)


@pytest.fixture
def tiny_store(tiny_corpus: TinyCorpus, tmp_path: Path) -> Store:
    """A store of the test's own that holds the corpus."""
    root = tmp_path / "store"
    root.mkdir()
    for kind in ("tokenizer", "corpus", "packing"):
        (root / kind).symlink_to(tiny_corpus.root / kind)
    return Store(root, patience=0)


def build(store: Store, kind: str, semantic: dict[str, Any], handler: Handler, request: dict[str, Any]) -> str:
    """Run a data stage's handler as a launcher would; its id."""
    folder = store.folder(kind, semantic_id(semantic))
    folder.create(semantic, {})
    attempt = folder.attempt(request)
    assert attempt is not None
    with attempt:
        assert handler(store, folder, request, attempt) == "done"
    return folder.id


def made_up_text(seed: int, size: int) -> str:
    """Paragraphs of made-up words, so that there is something to learn."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(200)]
    paragraphs = []
    length = 0
    while length < size:
        first = draw.randrange(len(words))
        chosen = [words[(first + step * 7) % len(words)] for step in range(draw.randint(5, 60))]
        paragraphs.append(" ".join(chosen) + ".")
        length += len(paragraphs[-1]) + 2
    return "\n\n".join(paragraphs) + "\n"
