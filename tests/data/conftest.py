"""Small sources and stages for the data tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zexp.data import corpus, embedded, packing, recipe, tokenizer
from zexp.store.folder import StageFolder, Store
from zexp.store.ids import semantic_id

HANDLERS: dict[str, Callable[..., str]] = {
    "tokenizer": tokenizer.run, "corpus": corpus.run, "packing": packing.run,
}  # fmt: skip
CONFIG = {
    "tokenizer": {"kind": "bpe", "vocab_size": 300, "sample_bytes": "20K", "weights": None},
    "packing": {"strategy": "concat", "document_mask": True},
    "heldout": 0.2,
    "seed": 0,
}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def build(store, tmp_path):
    """build(kind, semantic) runs a stage as a launcher does and gives its folder."""

    def build(kind: str, semantic: dict[str, Any]) -> StageFolder:
        folder = store.folder(kind, semantic_id(semantic))
        folder.create(semantic, {})
        request = {"directory": str(tmp_path)}
        attempt = folder.attempt(request, done=lambda: folder.result is not None)
        if attempt is not None:
            with attempt:
                assert HANDLERS[kind](store, folder, request, attempt) == "done"
        return folder

    return build


@pytest.fixture
def source(store, tmp_path):
    """source(kind=..., files=...) is its semantic block, planned in tmp_path."""

    def source(**keys: Any) -> dict[str, Any]:
        return recipe.source_semantic("mine", keys, store_root=store.root, directory=tmp_path)

    return source


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """packages({"numpy/a.py": text or bytes}) makes these files what the machine has."""
    root = tmp_path / "installed"

    def packages(files: dict[str, str | bytes]) -> None:
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())

    monkeypatch.setattr(embedded, "_root", lambda package, key: str(root / package))
    return packages


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines))
