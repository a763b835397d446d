"""A published tokenizer, as `tokenizers` and `transformers` write it: its identity at plan time, its copy in the store.

    DIR/tokenizer.json            read by zexp
        tokenizer_config.json     names the end of a document; goes along into exports
        special_tokens_map.json   the same in older folders

Its id is by content: where it lies does not matter. Imports no `tokenizers`: tokenizer.json is JSON.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zexp.config.errors import ConfigError
from zexp.store.errors import StoreError
from zexp.store.fingerprint import DigestCache, file_fingerprint

NUMERICS = {"data.tokenizer_hf": 1}
TOKENIZER = "tokenizer.json"
BESIDE = ("tokenizer_config.json", "special_tokens_map.json")
KEY = "corpus.tokenizer.path"


def semantic(config: Mapping[str, Any], directory: Path, cache: DigestCache) -> dict[str, Any]:
    """{kind, files, vocab_size, eod_id, numerics}. config: the keys of Tokenizer; directory: what its path is relative to.

    Raises ConfigError: no path, no tokenizer.json, one that cannot be read, no token that ends a document.
    """
    folder = _folder(config, directory)
    ids = _ids(folder)
    return {
        "kind": "hf",
        "files": fingerprint(folder, cache),
        "vocab_size": max(ids.values()) + 1,
        "eod_id": _eod_id(config.get("eod"), folder, ids),
        "numerics": dict(NUMERICS),
    }


def vocab_size(config: Mapping[str, Any], directory: Path) -> int:
    """One more than the highest token id: the rows that an embedding needs. Raises ConfigError as `semantic` does."""
    return max(_ids(_folder(config, directory)).values()) + 1


def fingerprint(folder: Path, cache: DigestCache) -> dict[str, Any]:
    return file_fingerprint(((name, folder / name) for name in files_of(folder)), cache)


def files_of(folder: Path) -> list[str]:
    """The names of the tokenizer's files that are there."""
    return [name for name in (TOKENIZER, *BESIDE) if (folder / name).is_file()]


def copy(folder: Path, found: Mapping[str, Any], target: Path) -> None:
    """Copy the files. found: their fingerprint at plan time. Raises StoreError if they are gone or have changed."""
    if not (folder / TOKENIZER).is_file():
        raise StoreError(f"{folder / TOKENIZER} is not there any more. Put it back, or plan with another {KEY}.")
    for name in files_of(folder):
        shutil.copyfile(folder / name, target / name)
    if fingerprint(target, DigestCache(None)) != found:
        raise StoreError(f"{folder}: the tokenizer's files have changed since the plan. Run the same command again.")


def with_ends(content: bytes, token: str) -> bytes:
    """One of the files BESIDE, with this token as its bos_token and its eos_token; as it is where it says so already."""
    made = json.loads(content)
    changed = {key: token for key in ("bos_token", "eos_token") if _text(made.get(key)) != token}
    return (json.dumps(made | changed, indent=2, ensure_ascii=False) + "\n").encode() if changed else content


def _text(token: Any) -> str | None:
    """What a special token is written as: {content, …} in some files, its text alone in others."""
    return token["content"] if isinstance(token, dict) else token


def _folder(config: Mapping[str, Any], directory: Path) -> Path:
    path = config.get("path")
    if not path:
        raise ConfigError(f"{KEY} is not set, and kind: hf reads a tokenizer. Name a folder with a {TOKENIZER}.")
    if config.get("weights") is not None:
        raise ConfigError("corpus.tokenizer.weights is set, but kind: hf trains no tokenizer. Set it to null.")
    folder = directory / Path(path).expanduser()
    if not (folder / TOKENIZER).is_file():
        there = "no such folder" if not folder.is_dir() else f"it has no {TOKENIZER}"
        raise ConfigError(f"{KEY} = {path}: {there}. Name a folder that a tokenizer was saved in.")
    return folder


def _ids(folder: Path) -> dict[str, int]:
    path = folder / TOKENIZER
    stat = path.stat()
    return _ids_at(path, (stat.st_size, stat.st_mtime_ns, stat.st_ino))


@functools.lru_cache(maxsize=4)
def _ids_at(path: Path, stamp: tuple[int, ...]) -> dict[str, int]:
    """Every token and its id. stamp: of the file, so that a changed one is read again."""
    made = _json(path)
    model = made.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: [token, log-probability] in the order of the ids
        ids = {str(token): number for number, (token, _) in enumerate(vocabulary)}
    elif isinstance(vocabulary, dict):
        ids = dict(vocabulary)
    else:
        raise ConfigError(f"{KEY}: {path} has no model.vocab; it is no tokenizer of the `tokenizers` library.")
    return ids | {added["content"]: added["id"] for added in made.get("added_tokens") or []}


def _eod_id(said: str | None, folder: Path, ids: Mapping[str, int]) -> int:
    """The id of the token that begins and ends documents: corpus.tokenizer.eod, else the folder's eos_token."""
    token, where = said, "corpus.tokenizer.eod"
    for name in BESIDE if said is None else ():
        found = _json(folder / name).get("eos_token") if (folder / name).is_file() else None
        if found is not None:
            token, where = _text(found), f"{folder / name}: eos_token"
            break
    if token is None:
        raise ConfigError(
            f"{KEY}: no file of {folder} names an eos_token. "
            "Say which token ends a document: corpus.tokenizer.eod='<...>'."
        )
    if token not in ids:
        raise ConfigError(
            f"{where} = {token!r} is no token of {folder / TOKENIZER}. Set corpus.tokenizer.eod to one of its tokens."
        )
    return ids[token]


def _json(path: Path) -> dict[str, Any]:
    try:
        made = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{KEY}: {path} cannot be read as JSON: {error}") from error
    if not isinstance(made, dict):
        raise ConfigError(f"{KEY}: {path} is no JSON object.")
    return made
