"""A study as one file for another machine, and back: what its report needs, and as many weights as were asked for.

What is not carried is told: of a state that stays here its manifest and state.json go to elsewhere/states/<tokens>/ in
the trajectory's folder, of a corpus its manifest to elsewhere/result/. So a report there says "done" of what is done here,
and a plan there takes none of it for something to train from or to score.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import zexp
from zexp.config.errors import ConfigError
from zexp.store import archive, files, inventory, lease, trash
from zexp.store.errors import StoreError
from zexp.store.folder import KINDS, OPTIMIZER, StageFolder, Store
from zexp.store.inventory import Inventory, Seen
from zexp.study import recorded
from zexp.study.record import VARIANTS

STATES = ("none", "ends", "all")
BULKY = ("corpus", "packing")  # what only training and the making of tasks read
FACTS = (files.MANIFEST, "state.json")
_NAME = re.compile(r"[^/\0]+")
_LEFT_HERE = re.compile(r"(?:\.[0-9a-f]{16}\.tmp|tmp|\.gone-.*|damaged-.*|wandb)")


def archive_name(study: str) -> str:
    return f"{study}.tar.gz"


def choose(look: Inventory, study: str, states: str) -> list[tuple[str, Path]]:
    """(name in the archive, file) of all that goes into it, in the order of the store. states: one of STATES."""
    record = recorded.read(look.store.study(study), study, current=True)
    keys = look.closure(record.folders)
    rows = [*record.listed["variants"], *record.listed["pretrained"]]
    ends = {row["segments"][-1] for row in rows}
    found: list[tuple[str, Path]] = []
    for kind in KINDS:
        for key in sorted(key for key in keys if key.startswith(f"{kind}/")):
            seen = look.stages[key]
            found += _stage(seen, states, {t for t in seen.states if f"{key.partition('/')[2]}@{t}" in ends})
    # The record last: whoever unpacks has everything once it is there.
    return found + list(_study(look.store, study))


def export(
    look: Inventory, study: str, target: Path, states: str, on_bytes: Callable[[int], None] | None = None
) -> tuple[int, int]:
    """Write a study's archive. (files, bytes of the archive). Raises ConfigError if target is there already."""
    archive.check_name(target)
    if target.exists():
        raise ConfigError(f"{target} is there already. Name another file with -o, or move it away.")
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {target.absolute().parent}. Make it first.")
    entries = choose(look, study, states)
    about = {
        "study": study,
        "states": states,
        "zexp": zexp.__version__,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "bytes": sum(size_of(path) for _, path in entries),
    }
    # Weights hardly shrink; texts do.
    size = archive.write(target, about, entries, level=6 if states == "none" else 1, on_bytes=on_bytes)
    return len(entries), size


def size_of(path: Path) -> int:
    """A file's bytes; 0 if it was deleted meanwhile (writing the archive says so)."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _study(store: Store, study: str) -> Iterator[tuple[str, Path]]:
    folder = store.study(study)
    for path in _files(folder):
        names = path.relative_to(folder).parts
        if names[0] not in ("report", "wandb") and names != (VARIANTS,):
            yield f"studies/{study}/{'/'.join(names)}", path
    yield f"studies/{study}/{VARIANTS}", folder / VARIANTS


def _stage(seen: Seen, states: str, ends: set[int]) -> Iterator[tuple[str, Path]]:
    """What goes of one stage. ends: the states that variants end in."""
    root, key = seen.folder.path, seen.key

    def whole(place: str, but: str | None = None) -> Iterator[tuple[str, Path]]:
        for path in _files(root / place):
            name = path.relative_to(root).as_posix()
            if but is None or not name.startswith(f"{place}/{but}/"):
                yield f"{key}/{name}", path

    def told(place: str, at: Path) -> Iterator[tuple[str, Path]]:
        for name in FACTS:
            if (at / name).is_file():
                yield f"{key}/elsewhere/{place}/{name}", at / name

    for name in ("config.yaml", "provenance.json", "diverged.json"):
        if (root / name).is_file():
            yield f"{key}/{name}", root / name
    for tokens, path in seen.folder.reported().items():
        state = seen.states.get(tokens)
        if state is not None and (states == "all" or (states == "ends" and tokens in ends)):
            # An end is for scoring: without the optimizer, if its manifest allows that.
            yield from whole(f"states/{tokens}", OPTIMIZER if states == "ends" and state.droppable else None)
        else:
            yield from told(f"states/{tokens}", path)
    result = seen.folder.reported_result
    if result is not None:
        carried = seen.result and (states == "all" or seen.folder.kind not in BULKY)
        yield from whole("result") if carried else told("result", result)
    for path in _files(root / "attempts"):
        names = path.relative_to(root).parts
        if not any(_LEFT_HERE.fullmatch(name) for name in names[2:]):
            yield f"{key}/{'/'.join(names)}", path


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                yield path


@dataclass
class Imported:
    """What became of an archive's stages, by kind/hash16. added: places that went into stages which were there; differs:
    places whose files are others than those here, which stay.
    """

    study: str
    new: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"study": self.study, "new": self.new, "kept": self.kept, "added": self.added, "differs": self.differs}


def import_(store: Store, path: Path, name: str | None = None, on_bytes: Callable[[int], None] | None = None) -> Imported:
    """Unpack a study's archive into a store. name: what the study is called here (default: as there).

    Everything is unpacked and compared with its checksums beside the stages first; then each stage appears by one renaming,
    and the study last. What is here stays as it is. Raises ConfigError for another study of that name, for an archive that
    is none, and for a stage that somebody works in; StoreError for a damaged one.
    """
    about = archive.read_about(path)
    study = str(about.get("study"))
    called = name or study
    for one in (study, called):
        if not _NAME.fullmatch(one) or one in (".", ".."):
            raise ConfigError(f"{one!r} cannot be a study's name.")
    store.check_writable()
    store.root.mkdir(parents=True, exist_ok=True)
    staging = store.root / f"{trash.UNPACKING}{secrets.token_hex(8)}"
    staging.mkdir()
    working = lease.acquire(staging, store.lease_times)  # says to a gc that this is somebody's
    assert working is not None
    working.start()
    try:
        archive.unpack(path, staging / "store", on_bytes)
        made = _place(Store(staging / "store"), store, study, called)
    finally:
        working.stop()
        trash.delete(staging)
    return made


def _place(staged: Store, store: Store, study: str, called: str) -> Imported:
    if not (staged.study(study) / VARIANTS).is_file():
        raise StoreError(f"The archive has no studies/{study}/{VARIANTS}.")
    listed = recorded.read(staged.study(study), study, current=True).listed
    if called != study:
        _rename(staged.study(study), called)
    there = store.study(called) / VARIANTS
    same = there.is_file() and there.read_bytes() == (staged.study(study) / VARIANTS).read_bytes()
    if store.study(called).exists() and not same:
        raise ConfigError(f"{store.root} has another study named {called!r}. Import this one under a name of its own: --as NAME")
    # The ages that a gc looks at begin now.
    look = inventory.look(staged) if any((staged.root / kind).is_dir() for kind in KINDS) else Inventory(staged)
    if look.strays:
        raise StoreError(f"{look.strays[0].path.relative_to(staged.root)} in the archive is no stage: {look.strays[0].problem}")
    for seen in look.stages.values():
        seen.folder.create(dict(seen.semantic), {})  # raises if its id is not its semantic block's
        for place in [*(f"states/{tokens}" for tokens in seen.states), *(["result"] if seen.result else [])]:
            files.verify_manifest(seen.folder.path / place, contents=False)
    made = Imported(called)
    _pin(listed, look)
    for seen in look.stages.values():
        target = store.folder(seen.folder.kind, seen.folder.id)
        if not target.path.exists():
            _released(seen)
            target.path.parent.mkdir(parents=True, exist_ok=True)
            if files.publish(seen.folder.path, target.path):
                made.new.append(seen.key)
                continue
        _merge(seen, target, made)
    if not same:
        (store.root / "studies").mkdir(exist_ok=True)
        if not files.publish(staged.study(study), store.study(called)):
            raise ConfigError(f"{store.root} has got a study named {called!r} meanwhile. Import this one with --as NAME.")
    return made


def _rename(folder: Path, called: str) -> None:
    for path in [folder / VARIANTS, *folder.glob(f"revisions/*/{VARIANTS}")]:
        listed = files.read_json(path)
        listed["study"]["name"] = called
        files.write_json(path, listed)
    for path in [folder / "study.yaml", *folder.glob("revisions/*/study.yaml")]:
        if path.is_file():
            files.write_yaml(path, {**files.read_yaml(path), "name": called})


def _pin(listed: dict[str, Any] | Any, look: Inventory) -> None:
    """The study's states are kept here as any study's are: its runs would pin them."""
    for stage in listed["stages"]:
        seen = look.stages.get(stage["folder"])
        if stage["kind"] == "segment" and seen is not None:
            seen.folder.pin(stage["to"])


def _released(seen: Seen) -> None:
    """A lease whose number is that of the last attempt: the next one here gets a number of its own."""
    last = seen.folder.last_attempt()
    if last is not None:
        lease.leave_released(seen.folder.path, last.n)


def _merge(seen: Seen, target: StageFolder, made: Imported) -> None:
    """Add to a stage that is here what it lacks; nothing of it is replaced."""
    if target.semantic() != seen.folder.semantic():
        raise StoreError(f"{target.path} and the archive disagree on what {target} is; `zexp store verify` looks at the one here.")
    missing = []
    for place in [*(f"states/{tokens}" for tokens in seen.states), *(["result"] if seen.result else [])]:
        here = target.path / place
        if not (here / files.MANIFEST).is_file():
            missing.append(place)
        elif _sums(here) != _sums(seen.folder.path / place):
            made.differs.append(f"{seen.key}/{place}")
    missing += [f"elsewhere/states/{tokens}" for tokens in seen.elsewhere if tokens not in target.reported()]
    if seen.told and not seen.result and target.reported_result is None:
        missing.append("elsewhere/result")
    if seen.diverged is not None and target.diverged() is None and not target.states():
        missing.append("diverged.json")
    if not target.attempts() and (seen.folder.path / "attempts").is_dir():
        missing.append("attempts")
    for tokens in seen.pins:
        target.pin(tokens)
    if not missing:
        made.kept.append(seen.key)
        return
    try:
        with trash.held(target) as held:
            for place in missing:
                held.check(fresh=True)
                if (seen.folder.path / place).is_dir():
                    if place == "attempts" and target.attempts():
                        continue
                    files.publish(seen.folder.path / place, target.path / place)
                else:
                    files.write_atomic(target.path / place, (seen.folder.path / place).read_bytes())
                made.added.append(f"{seen.key}/{place}")
            last = target.last_attempt()
        if last is not None and last.n > lease.highest(target.path):
            lease.leave_released(target.path, last.n)
    except trash.Busy as busy:
        raise ConfigError(f"{target}: {busy}. Import again when it is done; what was imported so far is kept.") from None


def _sums(folder: Path) -> Any:
    """Checksums that two makings of the same thing share: weights of one state may be written with headers in another order,
    so this says "may differ", not "is wrong".
    """
    listed = files.read_json(folder / files.MANIFEST).get("files", {})
    return {name: facts["sha256"] for name, facts in listed.items() if not name.startswith(f"{OPTIMIZER}/")}
