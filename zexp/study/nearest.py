"""Why a stage is not taken from the store: the finished stage there that is nearest to it, and the keys that differ.

Asked of stages whose parents are all there: below them everything differs because they do. What the plan itself holds is
no answer, a study's variants are meant to differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zexp.store import files
from zexp.store.folder import Store
from zexp.study.catalogue import Catalogue
from zexp.study.differ import Blocks, Difference, between, leaves, say
from zexp.study.plan import Plan, Stage

MOST_KEYS = 3  # a stage that differs in more is another stage, not an expected one
LINES = 4
LEAVES = 3  # of a difference that are written out

# Keys that are the same in every stage that could be meant; where these differ, a parent does.
ANCHORS = {
    "trajectory": ("parent.id",),
    "eval": ("state.id", "state.tokens", "task.name"),
    "packing": ("corpus",),
    "tasks": ("task",),
}


@dataclass(frozen=True)
class Nearest:
    """stages: planned ones that differ from something in the store in the same keys; found: what is nearest to the first of
    them, as an id; differences: a = planned, b = found.
    """

    stages: list[Stage]
    found: str
    differences: list[Difference]
    named: bool = False  # the study had another stage under the same variant's name

    @property
    def expected(self) -> bool:
        """The user has a reason to believe that it is in the store: it was once, or the code has changed since."""
        return self.named or all(one.leaf.startswith("numerics.") for one in self.differences)

    def line(self) -> str:
        first, more = self.stages[0], len(self.stages) - 1
        which = f"{first.label} is" if not more else f"{first.label} and {more} more are"
        shown = ", ".join(f"{one.leaf} ({say(one.a)}, was {say(one.b)})" for one in self.differences[:LEAVES])
        left = len(self.differences) - LEAVES
        of = "nearest" if not more else "nearest to the first"
        return f"{which} not in the store; {of}: {self.found} differs in {shown}" + (f" and {left} more" if left > 0 else "")

    def to_json(self) -> dict[str, Any]:
        return {
            "stages": [stage.id for stage in self.stages],
            "nearest": self.found,
            "differences": [one.to_json() for one in self.differences],
        }


@dataclass
class Finder:
    """Finds the nearest finished stage of a store; what it reads it reads once."""

    catalogue: Catalogue
    _blocks: dict[str, Blocks] = field(default_factory=dict)
    _without: dict[str, tuple[frozenset[str], int]] = field(default_factory=dict)
    _finished: dict[tuple[str, str], str | None] = field(default_factory=dict)

    @property
    def store(self) -> Store:
        return self.catalogue.store

    def near(
        self,
        kind: str,
        semantic: dict[str, Any],
        without: frozenset[str],
        *,
        also: str | None = None,
        most: int = MOST_KEYS,
        anchored: bool = True,
    ) -> tuple[str, list[Difference]] | None:
        """(the id of the finished stage that differs in fewest keys, the differences).

        without: folder names that are no answer; also: one that is, however many keys differ; most: in how many keys others
        may; anchored: parents must be the same.
        """
        known = self.catalogue.of(kind)
        if kind not in self._blocks:
            self._blocks[kind] = Blocks.of({name: one.semantic for name, one in known.items()})
        blocks = self._blocks[kind]
        if kind not in self._without or self._without[kind][0] is not without:
            self._without[kind] = (without, blocks.set_of(without))
        left_out = self._without[kind][1]
        anchors = ANCHORS.get(kind, ()) if anchored else ()
        mine = leaves(semantic)
        candidates = blocks.near(mine, most, anchors=anchors, without=left_out)
        for name in itertools.chain(candidates, [also] if also in known and also not in without else []):
            if (found := self.finished(kind, name)) is not None:
                return found, between(mine, blocks.leaves[name])
        return None

    def finished(self, kind: str, name: str) -> str | None:
        """The id of what is finished in a folder (of a trajectory its newest state). None if nothing is."""
        key = (kind, name)
        if key not in self._finished:
            folder = self.store.folder(kind, self.catalogue.of(kind)[name].id)
            if kind == "trajectory":
                states = folder.states()
                self._finished[key] = f"{name}@{states[-1]}" if states else None
            else:
                self._finished[key] = name if folder.result is not None else None
        return self._finished[key]


def nearest(plan: Plan, finder: Finder, study: str) -> list[Nearest]:
    """Of the stages that the plan will make although their parents are there, grouped by the keys that differ."""
    asked = [stage for stage in plan.to_do if _is_asked(stage, plan)]
    if not asked:
        return []
    own = frozenset(stage.full_id[:16] for stage in plan.stages.values())
    recorded = _recorded(plan, finder.store, study)
    groups: dict[tuple[str, ...], Nearest] = {}
    for stage in asked:
        kind = kind_of(stage)
        found = finder.near(kind, stage.semantic, own, also=recorded.get(stage.id))
        if found is None:
            continue
        key = (kind, *(one.leaf for one in found[1]))
        if key in groups:
            groups[key].stages.append(stage)
        else:
            groups[key] = Nearest([stage], *found, named=stage.id in recorded)
    return list(groups.values())


def lines(found: Sequence[Nearest], most: int = LINES) -> list[str]:
    """For people, at most so many, the last of them saying how many stages more there are."""
    said = [one.line() for one in found[:most]]
    left = sum(len(one.stages) for one in found[most:])
    if left:
        said[-1] += f"; {left} more stages are near to one of the store (zexp plan --json)"
    return said


def kind_of(stage: Stage) -> str:
    """The kind of the stage's folder."""
    return "trajectory" if stage.kind == "segment" else stage.kind


def _is_asked(stage: Stage, plan: Plan) -> bool:
    if stage.resume_from is not None or stage.weights_only or stage.diverged is not None:
        return False
    return not any(plan.stages[parent].needed for parent in stage.parents)


def _recorded(plan: Plan, store: Store, study: str) -> dict[str, str]:
    """Planned stage -> the folder's name of the one that stood in its place when this study was last recorded."""
    path = store.study(study) / "variants.json"
    if not path.is_file():
        return {}
    rows = {row["name"]: row for row in files.read_json(path)["variants"]}
    found: dict[str, str] = {}
    for variant in plan.variants:
        row = rows.get(variant.name)
        if row is None:
            continue
        segments = plan.segments[variant.name]
        if len(row["segments"]) == len(segments):
            found.update(zip(segments, (id.partition("@")[0] for id in row["segments"]), strict=True))
        for task, id in plan.evals[variant.name].items():
            if task in row["evals"]:
                found[id] = row["evals"][task]
    return found
