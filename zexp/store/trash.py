"""Taking things out of a store so that a kill at any instant leaves it whole: renamed first, deleted then.

    <stage>/dropped-<name>-<hex>        what gc took out of a stage's folder, under the stage's lease
    <stage>/trash-<name>-<hex>          the same by retention.py
    root/trash/<kind>-<hash16>-<hex>    whole stages, studies, archives that were being unpacked

What was renamed can be put back until its deletion begins; it is never put back after that.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zexp.store import files, lease
from zexp.store.folder import StageFolder, Store

TRASH = "trash"
UNPACKING = ".import-"
_DROPPED = "dropped-"
PREFIXES = (_DROPPED, "trash-")
# A lease whose holder's process cannot be looked at (another host) and that was silent for so many timeouts is waited
# for; a younger one is skipped at once.
_WATCHED_TIMEOUTS = 2  # so long a holder is watched that looks dead; one that beats on is alive, whatever the clocks say
_SCRATCH = re.compile(r"\.[0-9a-f]{16}\.tmp")


class Busy(Exception):
    """Somebody holds the stage's lease. The text says who."""


@dataclass(frozen=True)
class Aside:
    """Something that was renamed. was: where it belongs, now: where it lies."""

    was: Path
    now: Path


@contextlib.contextmanager
def held(folder: StageFolder) -> Iterator[lease.Lease]:
    """Hold a stage's lease without making an attempt, so that how its last attempt ended stays visible.

    Raises Busy at once if a live process holds it, or if the folder is gone (nothing is made in its place). It may be
    moved away when this is left.
    """

    def give_up(facts: dict[str, Any], waited: float) -> None:
        found = folder.holder()
        if found is not None or waited > _WATCHED_TIMEOUTS * folder.store.lease_times.timeout:
            raise Busy(said(facts if found is None else found))

    def is_gone() -> bool:
        return not (folder.path / "config.yaml").is_file()

    taken = lease.acquire(folder.path, folder.store.lease_times, done=is_gone, on_wait=give_up)
    if taken is None:
        raise Busy("it is gone by now")
    try:
        taken.start()
        yield taken
    finally:
        if taken.path.exists():
            taken.release()
        else:
            taken.stop()


def said(holder: dict[str, Any]) -> str:
    """A holder in words."""
    if "pid" not in holder:
        return "a process takes its lease just now"
    return f"process {holder['pid']} on {holder['host']} works in it"


def aside(folder: StageFolder, path: Path) -> Aside:
    """Rename something in a stage's folder, whose lease is held, to where nobody looks for it."""
    now = folder.path / f"{_DROPPED}{path.name}-{secrets.token_hex(4)}"
    os.rename(path, now)
    files.sync_folder(path.parent)
    return Aside(path, now)


def away(store: Store, path: Path, name: str) -> Aside:
    """Rename something whole (a stage's folder, a study's) into the store's trash."""
    (store.root / TRASH).mkdir(exist_ok=True)
    now = store.root / TRASH / f"{name}-{secrets.token_hex(4)}"
    os.rename(path, now)
    files.sync_folder(path.parent)
    return Aside(path, now)


def back(one: Aside) -> bool:
    """Undo a renaming. False if something has been made in its place meanwhile: that stays, and this is for delete()."""
    if one.was.exists():
        return False
    os.rename(one.now, one.was)
    files.sync_folder(one.was.parent)
    return True


def delete(path: Path) -> None:
    """Delete what was renamed, or was never in anybody's way. What cannot go now (NFS keeps open files) goes next time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_left_over(store: Store, path: Path) -> bool:
    """True for what only a killed process leaves in a store's root."""
    return path == store.root / TRASH or path.name.startswith(UNPACKING) or bool(_SCRATCH.fullmatch(path.name))


def left_over(path: Path) -> list[Path]:
    """The single things in a leftover of the root."""
    return sorted(path.iterdir()) if path.name == TRASH and path.is_dir() else [path]


def in_use(path: Path) -> bool:
    """True for a stage in the trash whose remover is alive: it may still put it back."""
    seen = lease.read(path)
    return seen is not None and not seen.free
