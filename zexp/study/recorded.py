"""The studies that a store knows by name, their earlier revisions with them, as plans: made from variants.json alone.

So what a study needs can be asked without its sweep file, its sources or Hydra, by whoever has the store.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zexp.store import files
from zexp.store.errors import StoreError
from zexp.store.folder import Store
from zexp.store.snapshot import Snapshot
from zexp.study import plan as plans
from zexp.study.record import VARIANTS

_STAGE = {"id", "kind", "folder", "parents", "variants", "from", "to", "tokens"}
_ADVICE = "Run the study again, or take the file from a copy of the store."
_ROW = {"name", "segments", "evals"}


@dataclass(frozen=True)
class Record:
    """One revision of a study. listed: its variants.json; current: not an earlier one that is kept beside it."""

    study: str
    revision: int
    current: bool
    listed: Mapping[str, Any]

    def __str__(self) -> str:
        return self.study if self.current else f"{self.study} (revision {self.revision})"

    @property
    def folders(self) -> set[str]:
        """kind/hash16 of all its stages."""
        return {stage["folder"] for stage in self.listed["stages"]}

    @property
    def keeps_whole(self) -> set[str] | None:
        """The variants that asked for ends with optimizers (checkpoint.keep.ends=all); None where that was not recorded."""
        rows = self.listed["variants"]
        if any("keep_ends" not in row for row in rows):
            return None
        return {row["name"] for row in rows if row["keep_ends"] == "all"}


def names(store: Store) -> list[str]:
    """The studies of a store, sorted. (names.studies, which is for what a user types, is the same.)"""
    folder = store.root / "studies"
    return sorted(path.parent.name for path in folder.glob(f"*/{VARIANTS}"))


def records(store: Store, revisions: int | None = None) -> list[Record]:
    """The current revision of every study and the last `revisions` earlier ones (None: all that are kept).

    Raises StoreError for a record that cannot be read: who does not know what is named must not delete.
    """
    found = []
    for name in names(store):
        found.append(read(store.study(name), name, current=True))
        earlier = _earlier(store.study(name))
        for number in earlier if revisions is None else earlier[len(earlier) - min(revisions, len(earlier)) :]:
            found.append(read(store.study(name) / "revisions" / str(number), name, current=False))
    return found


def read(folder: Path, name: str, *, current: bool) -> Record:
    """The record in a folder. Raises StoreError naming what is wrong with it."""
    path = folder / VARIANTS
    try:
        listed = files.read_json(path)
    except FileNotFoundError:
        raise StoreError(f"{path} is missing. {_ADVICE}") from None
    except StoreError as error:
        raise StoreError(f"{error} {_ADVICE}") from None
    problem = _problem(listed)
    if problem is not None:
        raise StoreError(f"{path} is no record of a study: {problem}. {_ADVICE}")
    return Record(name, int(listed["study"].get("revision") or 1), current, listed)


def stamp(store: Store) -> dict[str, tuple[int, int, int]]:
    """What changes when a study is recorded, changed or removed."""
    found = {}
    for path in sorted((store.root / "studies").glob(f"*/{VARIANTS}")):
        try:
            facts = os.stat(path)
        except FileNotFoundError:
            continue
        found[path.parent.name] = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
    return found


def plan(record: Record, store: Snapshot) -> plans.Plan:
    """The record's plan against a store: what is done there, and what would be trained."""
    stages: dict[str, plans.Stage] = {}
    for said in record.listed["stages"]:
        seen = store.seen.get(said["folder"])
        stages[said["id"]] = plans.Stage(
            id=said["id"],
            kind=said["kind"],
            # A folder that is not there has nothing that is done: any id that leads to it will do.
            full_id=said["folder"].partition("/")[2].ljust(64, "0") if seen is None else seen.folder.id,
            # Nor is anything known of what it carries across its fork: the parent's optimizer may be needed.
            semantic=_UNKNOWN if seen is None else dict(seen.semantic),
            parents=list(said["parents"]),
            phase=said.get("phase"),
            label=said.get("label") or "",
            start=said["from"],
            to=said["to"],
            tokens=said["tokens"],
            variants=list(said["variants"]),
        )
    rows = record.listed["variants"]
    ends = {row["name"]: dict(row["evals"]) for row in rows}
    scores = [stage for stage in stages.values() if stage.kind == "eval"]
    made = plans.Plan(
        stages,
        [],
        segments={row["name"]: list(row["segments"]) for row in rows},
        evals=ends,
        pretrained_evals={
            name: {s.id: s.id for s in scores if name in s.variants and s.id not in own.values()} for name, own in ends.items()
        },
        pretrained_stage={},
    )
    plans.mark(made, store)
    return made


_UNKNOWN: dict[str, Any] = {"parent": {}, "lr": [{"to": None}], "optimizer_state": "carry"}


def _earlier(folder: Path) -> list[int]:
    return sorted(int(path.parent.name) for path in folder.glob(f"revisions/*/{VARIANTS}") if path.parent.name.isdigit())


def _problem(listed: Any) -> str | None:
    if not isinstance(listed, dict):
        return "it is no JSON object"
    missing = [key for key in ("study", "stages", "variants", "pretrained") if key not in listed]
    if missing:
        return f"it has no {', '.join(missing)}"
    for key, needed in (("stages", _STAGE), ("variants", _ROW), ("pretrained", _ROW)):
        for entry in listed[key]:
            if not isinstance(entry, dict) or (lacks := sorted(needed - entry.keys())):
                return f"an entry of {key} has no {', '.join(lacks) if isinstance(entry, dict) else 'keys'}"
    known = {stage["id"] for stage in listed["stages"]}
    named = {id for row in [*listed["variants"], *listed["pretrained"]] for id in [*row["segments"], *row["evals"].values()]}
    named |= {parent for stage in listed["stages"] for parent in stage["parents"]}
    if named - known:
        return f"it names stages that it does not list: {', '.join(sorted(named - known)[:3])}"
    return None
