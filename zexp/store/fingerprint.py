"""Fingerprints of input files: relative name + size + sha256.

The sha256 is cached by (path, size, mtime, inode): a plan over gigabytes of text costs one stat a file.
Deleting the cache only costs time.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zexp.store import files
from zexp.store.errors import StoreError
from zexp.store.ids import canonical_json

# A file that changes within a clock step of being read keeps its mtime (FAT: 2 s): young ones are not cached.
_YOUNG_SECONDS = 3.0


class DigestCache:
    """sha256 of files. path: where to keep them between runs (store.cache / "files.json"), None = nowhere."""

    def __init__(self, path: Path | None):
        self._path = path
        self._known: dict[str, list[Any]] | None = None
        self._new: dict[str, list[Any]] = {}

    def sha256(self, path: Path) -> tuple[int, str]:
        """(bytes, sha256 in hex) of a file. Raises StoreError if it changes while it is read."""
        name = os.path.abspath(path)
        before = _stamp(path)
        if self._known is None:
            self._known = _load(self._path)
        entry = self._new.get(name) or self._known.get(name)
        if entry is not None and entry[:3] == before:
            return before[0], entry[3]
        digest = files.sha256_file(path)
        if _stamp(path) != before:
            raise StoreError(f"{path} changed while it was read; its fingerprint would mean nothing.")
        if time.time() - before[1] / 1e9 > _YOUNG_SECONDS:
            self._new[name] = [*before, digest]
        return before[0], digest

    def save(self) -> None:
        """Add what was read to the file on disk (other processes may have added there, too)."""
        if self._path is None or not self._new:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(self._path, {**_load(self._path), **self._new})
        except OSError:
            return  # a plan over somebody else's store, read-only: the next one reads the files again
        self._known, self._new = None, {}


def file_fingerprint(named: Iterable[tuple[str, Path]], cache: DigestCache) -> dict[str, Any]:
    """{files: number, bytes: sum, sha256 over all (name, bytes, sha256), sorted by name} of files with the names that
    identify them, so it does not depend on where they are. What was read stays in the cache.
    """
    rows = sorted([name, *cache.sha256(path)] for name, path in named)
    cache.save()
    return {
        "files": len(rows),
        "bytes": sum(row[1] for row in rows),
        "sha256": hashlib.sha256(canonical_json(rows).encode("ascii")).hexdigest(),
    }


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _load(path: Path | None) -> dict[str, list[Any]]:
    if path is None:
        return {}
    try:
        known = files.read_json(path)
    except (OSError, StoreError):
        return {}  # not there, or damaged: it is a cache
    return known if isinstance(known, dict) else {}
