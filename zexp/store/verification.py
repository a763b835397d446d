"""Whether what was published is still what its manifest says, and whether it can still be used.

Read only, but for set_aside(). What a run publishes is never altered, so this may go on beside it; two things that look
like damage are looked at again: a state that retention took away, and an optimizer part that went.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from zexp.store import files, trash
from zexp.store.attempt import Attempt
from zexp.store.errors import StoreError
from zexp.store.folder import StageFolder
from zexp.store.ids import SHORT, semantic_id
from zexp.store.inventory import Inventory, Seen
from zexp.store.lease import acquire


@dataclass(frozen=True)
class Damage:
    """stage: kind/hash16, or what else is damaged; place: "result", "states/<tokens>" or a file; advice: what to do."""

    stage: str
    place: str
    problem: str
    advice: str
    movable: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"stage": self.stage, "place": self.place, "problem": self.problem, "advice": self.advice}


_NAME = re.compile(rf"[0-9a-f]{{{SHORT}}}")
AGAIN = "zexp store verify --set-aside moves it away; the next run makes it again"


def published(seen: Seen) -> list[tuple[str, int]]:
    """(place, bytes) of what a stage has published."""
    found = [(f"states/{t}", s.size.apparent + s.optimizer.apparent) for t, s in sorted(seen.states.items())]
    return [*found, ("result", seen.parts["result"].apparent)] if seen.result else found


def check(
    inventory: Inventory, keys: list[str], *, contents: bool = True, on_bytes: Callable[[int], None] | None = None
) -> list[Damage]:
    """What is damaged in these stages. contents=False: names and sizes only. on_bytes: how much was looked at since."""
    found: list[Damage] = []
    for key in keys:
        seen = inventory.stages[key]
        found += _config(seen)
        found += _lineage(inventory, seen)
        for place, size in published(seen):
            problem = _problem(seen.folder, place, contents)
            if problem is not None:
                found.append(Damage(key, place, problem, AGAIN, movable=True))
            if on_bytes is not None:
                on_bytes(size)
    return found


def strays(inventory: Inventory) -> Iterator[Damage]:
    """Folders among the stages that are none. (Not one whose making was cut off, or goes on: a run completes it.)"""
    for stray in inventory.strays:
        key = f"{stray.path.parent.name}/{stray.path.name}"
        begun = [*stray.path.glob("states/*"), *stray.path.glob("result")]
        if begun:
            advice = "put its config.yaml back (a copy of the store has it), or move the folder out of the store: it is made again"
            yield Damage(key, "config.yaml", stray.problem.replace(f"{stray.path}/", ""), advice)
        elif not _NAME.fullmatch(stray.path.name):
            yield Damage(key, "", stray.problem, "move it out of the store if it is yours; nothing reads it")


def set_aside(folder: StageFolder, place: str) -> bool:
    """Move a damaged published folder into a new attempt's, under the stage's lease. False if it is whole (again) or gone.

    Raises trash.Busy if somebody works in the stage.
    """

    def give_up(facts: dict[str, Any], waited: float) -> None:
        raise trash.Busy(trash.said(facts))

    lease = acquire(folder.path, folder.store.lease_times, on_wait=give_up)
    assert lease is not None
    with Attempt(folder, lease, {"set_aside": place}) as attempt:
        if _problem(folder, place, contents=True) is None:
            return False
        attempt.set_aside(place)
    return True


def _problem(folder: StageFolder, place: str, contents: bool) -> str | None:
    for last in (False, True):
        path = folder.path / place
        if not path.exists():
            return None  # retention's, or somebody set it aside
        try:
            files.verify_manifest(path, contents=contents)
        except (StoreError, FileNotFoundError) as error:
            if last:
                return str(error).replace(f"{path}/", "")
        else:
            return None
    return None


def _config(seen: Seen) -> Iterator[Damage]:
    try:
        made = semantic_id(dict(seen.semantic))
    except (TypeError, ValueError) as error:
        made = f"none ({error})"
    if made != seen.folder.id:
        problem = f"the id of its semantic block is {made[:16]}, not {seen.folder.path.name}: it was edited"
        yield Damage(seen.key, "config.yaml", problem, "move the folder out of the store: the next run makes it again")


def _lineage(inventory: Inventory, seen: Seen) -> Iterator[Damage]:
    """A state can be used if the folders of its whole chain are there; what they hold can be made again from these."""
    parent = seen.semantic.get("parent")
    if isinstance(parent, dict) and seen.states:
        key = f"trajectory/{str(parent['id'])[:16]}"
        found = inventory.stages.get(key)
        if found is None or found.folder.id != parent["id"]:
            yield Damage(
                seen.key, "config.yaml", f"it forks from {key} at {parent['tokens']:,} tokens, which is not in this store",
                "run its study again, or import the study's archive: without the parent's config.yaml no model can be read",
            )  # fmt: skip


def size_of(inventory: Inventory, keys: list[str]) -> int:
    """Bytes that check() will look at."""
    return sum(size for key in keys for _, size in published(inventory.stages[key]))
