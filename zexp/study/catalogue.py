"""The semantic blocks of a store's stages, by folder: what plan compares with and where it looks up what was measured.

Reading a config.yaml takes about a millisecond, so the blocks are kept in store/cache/semantics/<kind>.json, each with the
time of its config.yaml. Deleting that costs time only. A plan reads at most READ_AT_MOST folders that are not in there,
the youngest first; the next one reads the others.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zexp.store import files
from zexp.store.errors import StoreError
from zexp.store.folder import Store

READ_AT_MOST = 500


@dataclass(frozen=True)
class Known:
    """A folder of the store: its whole id, its semantic block, and the time of its config.yaml in ns."""

    id: str
    semantic: dict[str, Any]
    made: int


@dataclass
class Catalogue:
    """Looks into a store; reads each kind when it is asked for the first time."""

    store: Store
    _kinds: dict[str, dict[str, Known]] = field(default_factory=dict)

    def of(self, kind: str) -> dict[str, Known]:
        """Folder name (the id's first 16 digits) -> what is in it, of the folders of a kind."""
        if kind not in self._kinds:
            self._kinds[kind] = self._read(kind)
        return self._kinds[kind]

    def semantic(self, kind: str, id: str) -> dict[str, Any] | None:
        """The block with that id; None if the store (or what was read of it) has none."""
        known = self.of(kind).get(id[:16])
        return known.semantic if known is not None and known.id == id else None

    def root(self, id: str) -> dict[str, Any] | None:
        """The block of the first segment of a trajectory's chain, with its model. None if a link is missing."""
        semantic = self.semantic("trajectory", id)
        while semantic is not None and semantic["parent"] is not None:
            semantic = self.semantic("trajectory", semantic["parent"]["id"])
        return semantic

    def _read(self, kind: str) -> dict[str, Known]:
        cache = self.store.cache / "semantics" / f"{kind}.json"
        before = _load(cache)
        found: dict[str, Known] = {}
        new: list[tuple[int, str]] = []
        for name, stamp in _configs(self.store.root / kind):
            entry = before.get(name)
            if entry is not None and entry[0] == stamp:
                found[name] = Known(entry[1], entry[2], stamp)
            else:
                new.append((stamp, name))
        for stamp, name in sorted(new, reverse=True)[:READ_AT_MOST]:
            try:
                config = files.read_yaml(self.store.root / kind / name / "config.yaml")
                found[name] = Known(config["id"], config["semantic"], stamp)
            except (OSError, StoreError, KeyError, TypeError):
                continue  # no stage's folder; whoever plans that stage is told
        if new or len(before) != len(found):
            _save(cache, found)
        return found


def _configs(folder: Path) -> list[tuple[str, int]]:
    """(name, time of config.yaml) of every stage below a kind's folder."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for name in names:
        try:
            found.append((name, os.stat(folder / name / "config.yaml").st_mtime_ns))
        except (FileNotFoundError, NotADirectoryError):
            continue
    return found


def _load(path: Path) -> dict[str, list[Any]]:
    try:
        known = files.read_json(path)
    except (OSError, StoreError):
        return {}  # not there, or damaged: it is a cache
    return known if isinstance(known, dict) else {}


def _save(path: Path, found: dict[str, Known]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({name: [one.made, one.id, one.semantic] for name, one in found.items()})
        files.write_atomic(path, text, sync=False)
    except OSError:
        return  # somebody else's store, read-only: the next plan reads the folders again
