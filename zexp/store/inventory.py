"""What lies in a store: each stage's folder with its states, results, temporaries and sizes, as one look found it.

Only looks. A look is not atomic: what another process makes or deletes meanwhile may be in it or not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zexp.config.errors import ConfigError
from zexp.store import files, sizes, trash
from zexp.store.attempt import AttemptRecord
from zexp.store.errors import StoreError
from zexp.store.folder import KINDS, OPTIMIZER, StageFolder, Store
from zexp.store.ids import SHORT
from zexp.store.retention import NEWEST
from zexp.store.sizes import Size

_NAME = re.compile(rf"[0-9a-f]{{{SHORT}}}")
_ID = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.tmp")  # what files.write_atomic had begun


@dataclass(frozen=True)
class SeenState:
    """A published state. size: without its optimizer part; droppable: the manifest allows that part to be missing."""

    tokens: int
    path: Path
    size: Size
    optimizer: Size
    trainable: bool
    rolling: bool
    droppable: bool
    made: float


@dataclass(frozen=True)
class Seen:
    """A stage's folder. made, used: seconds since 1970; used is its newest attempt, pin, state or result.

    parts: sizes by what they are (see _part); leftovers: temporaries and trash by path; set_aside: damaged things by path.
    failed: its last attempt ended by an exception; keeps_rolling: so many rolling states its last attempt was to keep;
    called: what the study of that attempt called a trajectory.
    """

    folder: StageFolder
    semantic: Mapping[str, Any]
    states: Mapping[int, SeenState]
    elsewhere: tuple[int, ...]
    result: bool
    told: bool
    diverged: dict[str, Any] | None
    failed: bool
    keeps_rolling: int
    called: str
    pins: tuple[int, ...]
    optimizer_pins: tuple[int, ...]
    parts: Mapping[str, Size]
    leftovers: Mapping[str, Size]
    set_aside: Mapping[str, Size]
    made: float
    used: float
    holder: dict[str, Any] | None

    @property
    def key(self) -> str:
        """kind/hash16, as plans name folders."""
        return str(self.folder)

    @property
    def size(self) -> Size:
        return sizes.total(list(self.parts.values()))

    @property
    def start(self) -> int:
        """Where a trajectory's segment begins, in tokens."""
        parent = self.semantic.get("parent")
        return int(parent["tokens"]) if parent else 0


@dataclass(frozen=True)
class Stray:
    """A folder among the stages that is none: its config.yaml is missing, unreadable or another's."""

    path: Path
    problem: str
    size: Size


@dataclass
class Inventory:
    """By kind/hash16, in the order of KINDS and ids. others: cache, studies, trash and what else lies in the root."""

    store: Store
    stages: dict[str, Seen] = field(default_factory=dict)
    strays: list[Stray] = field(default_factory=list)
    others: dict[str, Size] = field(default_factory=dict)
    leftovers: dict[str, Size] = field(default_factory=dict)  # of the root, by path

    def references(self, seen: Seen) -> Iterator[str]:
        """Keys of the stages in this store that a stage's semantic block names: parents, packings, corpora, tokenizers …"""
        for id in _ids(seen.semantic):
            for kind in KINDS:
                found = self.stages.get(f"{kind}/{id[:SHORT]}")
                if found is not None and found.folder.id == id:
                    yield found.key

    def closure(self, keys: Iterable[str]) -> set[str]:
        """The stages with these keys and all that they are made from, as far as they are in the store."""
        found: set[str] = set()
        waiting = [key for key in keys if key in self.stages]
        while waiting:
            key = waiting.pop()
            if key not in found:
                found.add(key)
                waiting += self.references(self.stages[key])
        return found


def look(store: Store, on_folder: Callable[[int], None] | None = None) -> Inventory:
    """Everything in a store. on_folder is called with the number of folders seen so far.

    Raises ConfigError if there is no such folder.
    """
    if not store.root.is_dir():
        raise ConfigError(f"store = '{store.root}' is no folder. Name one that holds results: --store DIR, or ZEXP_STORE.")
    made = Inventory(store)
    for kind in KINDS:
        for name in _listed(store.root / kind):
            path = store.root / kind / name
            if not _NAME.fullmatch(name) or not path.is_dir():
                made.strays.append(Stray(path, "its name is no id", sizes.measure(path)))
                continue
            try:
                seen = see(store, kind, name)
            except FileNotFoundError:
                continue  # deleted while this looked
            except StoreError as error:
                made.strays.append(Stray(path, str(error), sizes.measure(path)))
            else:
                made.stages[seen.key] = seen
            if on_folder is not None:
                on_folder(len(made.stages) + len(made.strays))
    for name in _listed(store.root):
        path = store.root / name
        if trash.is_left_over(store, path):
            made.leftovers |= {str(one): sizes.measure(one) for one in trash.left_over(path)}
        elif name not in KINDS:
            made.others[name] = sizes.measure(path)
    return made


def see(store: Store, kind: str, name: str) -> Seen:
    """One stage's folder. Raises StoreError if it is no stage's, FileNotFoundError if it is not there (any more)."""
    path = store.root / kind / name
    config_path = path / "config.yaml"
    try:
        made = config_path.stat().st_mtime
        config = files.read_yaml(config_path)
    except FileNotFoundError:
        if not path.is_dir():
            raise
        raise StoreError(f"{config_path} is missing: the making of this folder was cut off, or somebody removed the file.") from None
    id = config.get("id") if isinstance(config, dict) else None
    semantic = config.get("semantic") if isinstance(config, dict) else None
    if not isinstance(id, str) or not _ID.fullmatch(id) or not id.startswith(name) or config.get("kind") != kind:
        raise StoreError(f"{config_path} has not the id and the kind that its folder is named by.")
    if not isinstance(semantic, dict):
        raise StoreError(f"{config_path} has no semantic block.")
    folder = StageFolder(store, kind, id, path)
    found = sizes.parts(path, _part)
    states = {tokens: _state(folder, tokens, found) for tokens in folder.states()}
    last = folder.last_attempt()
    request = _request(last)
    pinned = folder.pins()
    return Seen(
        folder=folder,
        semantic=semantic,
        states={tokens: state for tokens, state in states.items() if state is not None},
        elsewhere=tuple(tokens for tokens in folder.reported() if tokens not in states),
        result=folder.result is not None,
        told=folder.reported_result is not None,
        diverged=folder.diverged(),
        failed=last is not None and last.failure() is not None,
        keeps_rolling=int((request.get("checkpoint") or {}).get("rolling", NEWEST)),
        called=str((request.get("logger") or {}).get("name") or ""),
        pins=tuple(pinned),
        optimizer_pins=tuple(tokens for tokens in pinned if folder.keeps_optimizer(tokens)),
        parts=found,
        leftovers={str(path / part): size for part, size in found.items() if _is_leftover(part)},
        set_aside={str(path / part): size for part, size in found.items() if part.rpartition("/")[2].startswith("damaged-")},
        made=made,
        used=max([made, *_times(path)]),
        holder=folder.holder(),
    )


def _state(folder: StageFolder, tokens: int, found: Mapping[str, Size]) -> SeenState | None:
    path = folder.state(tokens)
    if path is None:
        return None
    try:
        manifest = files.read_json(path / files.MANIFEST)
        made = (path / files.MANIFEST).stat().st_mtime
    except FileNotFoundError:
        return None
    except StoreError:
        manifest, made = {}, 0.0  # for verify to tell; here it is a state of which nothing may be dropped
    return SeenState(
        tokens=tokens,
        path=path,
        size=found.get(f"states/{tokens}", Size()),
        optimizer=found.get(f"states/{tokens}/{OPTIMIZER}", Size()),
        trainable=folder.trainable(tokens) is not None,
        rolling=manifest.get("rolling") is True,
        droppable=OPTIMIZER in manifest.get("droppable", []),
        made=made,
    )


def _request(last: AttemptRecord | None) -> dict[str, Any]:
    try:
        return {} if last is None else last.request()
    except (FileNotFoundError, StoreError):
        return {}  # a hint, for who has no record of the study


def _part(names: tuple[str, ...]) -> str:
    """What a file of a stage's folder belongs to."""
    if not names:
        return "other"
    if names[0].startswith(trash.PREFIXES):
        return names[0]
    if _UNFINISHED.fullmatch(names[-1]):
        return "/".join(names)
    if names[0] == "attempts" and len(names) > 2:
        if names[2] == "tmp" or names[2].startswith((".gone-", "damaged-")):
            return "/".join(names[:3])
        return "attempts"
    if names[0] == "states" and len(names) > 1:
        return "/".join(names[: 3 if len(names) > 2 and names[2] == OPTIMIZER else 2])
    return names[0] if names[0] in ("result", "attempts", "elsewhere") else "other"


def _is_leftover(part: str) -> bool:
    last = part.rpartition("/")[2]
    return part.startswith(trash.PREFIXES) or bool(_UNFINISHED.fullmatch(last)) or (
        part.startswith("attempts/") and (last == "tmp" or last.startswith(".gone-"))
    )  # fmt: skip


def _times(path: Path) -> Iterator[float]:
    """When it was worked with: not by a lease's time nor the folder's, which change when something is deleted."""
    for pattern in ("attempts/*", "pins/*", "states/*/manifest.json", "result/manifest.json", "diverged.json"):
        for one in path.glob(pattern):
            try:
                yield one.stat().st_mtime
            except FileNotFoundError:
                continue


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _ids(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if _ID.fullmatch(value):
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _ids(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _ids(item)
