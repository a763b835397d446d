"""Stages as jobs, and jobs as arrays: a pure function of the tree.

A *unit* is what one job runs: a stage, the evaluations of one state, or several short stages. Units of one shape that wait
for the same units become one array, with `afterok` on each parent's element; one-to-one chains become an array that is
`aftercorr` another, so that one failed element takes only its own successor. A dependency wakes, and decides nothing: a job
first looks at its stages' parents in the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from zexp.study.launch.base import Stage
from zexp.study.launch.slurm.options import CLASSES, Resources, Shape, SlurmOptions, shape_of


@dataclass(frozen=True)
class Unit:
    """What one job runs, in this order. parents: places of other units in the list; behind: job ids of other studies that
    work on one of these stages now."""

    stages: tuple[Stage, ...]
    shape: Shape
    parents: frozenset[int] = frozenset()
    behind: frozenset[str] = frozenset()
    rank: float = 0.0  # seconds from its start to the end of the longest chain below it

    @property
    def cost(self) -> float:
        return sum(stage.cost for stage in self.stages)


def asks_for_success(parent: Unit, child: Shape) -> bool:
    """True if a job may be cancelled when its parent's job fails; else it only waits for its end and looks itself.

    Of several stages in one job some may have succeeded, and a training waits for all data, not only for its own.
    """
    return len(parent.stages) == 1 and (parent.shape.kind != "data" or child.kind == "data")


@dataclass(frozen=True)
class Array:
    """Units that are submitted together.

    corresponds: the array (its place in the list) whose elements' successors these are, element by element; None = all
    elements wait for `waits`: units (their place in the list of units).
    """

    units: tuple[int, ...]
    shape: Shape
    waits: frozenset[int] = frozenset()
    behind: frozenset[str] = frozenset()
    corresponds: int | None = None


@dataclass
class _Making:
    """units_of while it works."""

    stages: Sequence[Stage]
    shapes: Mapping[str, Shape]
    resources: Mapping[str, Resources]
    groups: list[list[Stage]] = field(default_factory=list)
    unit_of: dict[str, int] = field(default_factory=dict)

    def add(self, stages: Sequence[Stage]) -> None:
        for stage in stages:
            self.unit_of[stage.id] = len(self.groups)
        self.groups.append(list(stages))

    def parents(self, stages: Sequence[Stage]) -> frozenset[int]:
        own = {stage.id for stage in stages}
        found = {self.unit_of[p] for stage in stages for p in stage.parents if p in self.unit_of and p not in own}
        if CLASSES[stages[0].kind] != "data":  # nothing is trained before all supplies are known
            found |= {n for n, group in enumerate(self.groups) if CLASSES[group[0].kind] == "data"}
        return frozenset(found)


def units_of(
    stages: Sequence[Stage],
    shapes: Mapping[str, Shape],
    resources: Mapping[str, Resources],
    behind: Mapping[str, frozenset[str]],
) -> list[Unit]:
    """The units of stages, parents first.

    stages: parents first; parents that are not among them are in the store. shapes, behind: by stage id; resources: by class.
    """
    making = _Making(stages, shapes, resources)
    _add_data(making)
    rest = [stage for stage in stages if stage.id not in making.unit_of]
    data = [stage for stage in rest if CLASSES[stage.kind] == "data"]
    for level in [*_levels(data), *_levels([stage for stage in rest if CLASSES[stage.kind] != "data"])]:
        bundles: dict[object, list[Stage]] = {}
        for stage in level:
            together = ("eval", stage.parents[0] if stage.parents else "") if stage.kind == "eval" else ("stage", stage.id)
            bundles.setdefault((together, shapes[stage.id]), []).append(stage)
        packs: dict[object, list[list[Stage]]] = {}
        for bundle in bundles.values():
            key = (CLASSES[bundle[0].kind], shapes[bundle[0].id], making.parents(bundle))
            packs.setdefault(key, []).append(bundle)
        for bundle_list in packs.values():
            first = bundle_list[0][0]
            alone = shapes[first.id].tasks > 1  # its tasks are ranks of one stage
            for packed in bundle_list if alone else _packed(bundle_list, resources[CLASSES[first.kind]]):
                making.add(packed)
    return _ranked(making, behind)


def _add_data(making: _Making) -> None:
    """Data stages that are short together share one job, parents first: their chain is not worth a queue for each."""
    data = [stage for stage in making.stages if CLASSES[stage.kind] == "data"]
    if not data:
        return
    own = making.resources["data"]
    few = own.stages_per_job is not None and len(data) <= own.stages_per_job
    cost = sum(stage.cost for stage in data)
    short = bool(own.pack_minutes) and all(s.cost > 0 for s in data) and cost <= 60 * (own.pack_minutes or 0)
    if (few or short) and len({making.shapes[stage.id] for stage in data}) == 1:
        making.add(data)


def _levels(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Stages by the length of the longest chain of parents above them; the evaluations of one state stand together."""
    depth: dict[str, int] = {}
    for stage in stages:
        depth[stage.id] = 1 + max((depth[p] for p in stage.parents if p in depth), default=-1)
    deepest: dict[str, int] = {}
    for stage in stages:
        if stage.kind == "eval" and stage.parents:
            deepest[stage.parents[0]] = max(deepest.get(stage.parents[0], 0), depth[stage.id])
    levels: dict[int, list[Stage]] = {}
    for stage in stages:
        level = deepest[stage.parents[0]] if stage.kind == "eval" and stage.parents else depth[stage.id]
        levels.setdefault(level, []).append(stage)
    return [levels[level] for level in sorted(levels)]


def _packed(bundles: list[list[Stage]], own: Resources) -> list[list[Stage]]:
    """Bundles that may share a job, put together up to the number or the length that is asked for."""
    minutes = own.pack_minutes or 0.0
    if own.stages_per_job is None and not minutes:
        return bundles
    packed: list[list[Stage]] = []
    for bundle in bundles:
        if packed and _fits(packed[-1], bundle, own.stages_per_job, 60 * minutes):
            packed[-1] = packed[-1] + bundle
        else:
            packed.append(list(bundle))
    return packed


def _fits(there: list[Stage], more: list[Stage], most: int | None, seconds: float) -> bool:
    together = there + more
    if most is not None and len(together) > most:
        return False
    if seconds:
        return all(stage.cost > 0 for stage in together) and sum(stage.cost for stage in together) <= seconds
    return most is not None


def _ranked(making: _Making, behind: Mapping[str, frozenset[str]]) -> list[Unit]:
    """The groups as units: only the parents that say something, and the length of what hangs on each."""
    order = _parents_first([making.parents(group) for group in making.groups])
    place = {old: new for new, old in enumerate(order)}
    groups = [making.groups[old] for old in order]
    parents = [frozenset(place[p] for p in making.parents(group)) for group in groups]
    above: list[frozenset[int]] = []
    for own in parents:
        above.append(own.union(*(above[p] for p in own)))
    # A parent that is above another parent has been waited for already.
    reduced = [own - frozenset().union(*(above[p] for p in own)) for own in parents]
    rank = [0.0] * len(groups)
    for number in reversed(range(len(groups))):
        rank[number] += sum(stage.cost for stage in groups[number])
        for parent in parents[number]:
            rank[parent] = max(rank[parent], rank[number])
    # rank[parent] held the longest chain below it when its own cost was added.
    return [
        Unit(
            stages=tuple(group),
            shape=making.shapes[group[0].id],
            parents=reduced[number],
            behind=frozenset().union(*(behind.get(stage.id, frozenset()) for stage in group)),
            rank=rank[number],
        )
        for number, group in enumerate(groups)
    ]


def _parents_first(parents: Sequence[frozenset[int]]) -> list[int]:
    ordered: dict[int, None] = {}

    def visit(number: int) -> None:
        if number not in ordered:
            for parent in sorted(parents[number]):
                visit(parent)
            ordered[number] = None

    for number in range(len(parents)):
        visit(number)
    return list(ordered)


def arrays_of(units: Sequence[Unit], max_array_size: int) -> list[Array]:
    """The arrays in the order of their submission: what they wait for is submitted before them, and of those that could
    be submitted next the one with the longest chain comes first. Inside an array the longest chains come first."""
    if max_array_size < 1:
        raise ValueError(f"max_array_size = {max_array_size}: an array has at least one element.")
    arrays: list[Array] = []
    array_of: dict[int, int] = {}
    waiting = dict.fromkeys(range(len(units)))
    while waiting:
        ready = [number for number in waiting if all(parent in array_of for parent in units[number].parents)]
        made = _chained(units, ready, arrays, array_of)
        chained = {number for array in made for number in array.units}
        groups: dict[object, list[int]] = {}
        for number in ready:
            if number not in chained:
                unit = units[number]
                groups.setdefault((unit.shape, unit.parents, unit.behind), []).append(number)
        for group in groups.values():
            ordered = sorted(group, key=lambda number: (-units[number].rank, number))
            for start in range(0, len(ordered), max_array_size):
                part = tuple(ordered[start : start + max_array_size])
                made.append(Array(part, units[part[0]].shape, units[part[0]].parents, units[part[0]].behind))
        for array in sorted(made, key=lambda array: (-max(units[n].rank for n in array.units), array.units)):
            for number in array.units:
                array_of[number] = len(arrays)
                del waiting[number]
            arrays.append(array)
    return arrays


def _chained(
    units: Sequence[Unit], ready: Sequence[int], arrays: Sequence[Array], array_of: Mapping[int, int]
) -> list[Array]:
    """Arrays of which every element follows the element of the same place in another array.

    Only where that makes fewer arrays than one a parent would, and behind units of one stage: `aftercorr` asks for success,
    and of several stages some may have succeeded.
    """
    children: dict[tuple[Shape, int], dict[int, list[int]]] = {}
    for number in ready:
        unit = units[number]
        if len(unit.parents) == 1 and not unit.behind:
            (parent,) = unit.parents
            if asks_for_success(units[parent], unit.shape) and len(arrays[array_of[parent]].units) > 1:
                children.setdefault((unit.shape, array_of[parent]), {}).setdefault(parent, []).append(number)
    made: list[Array] = []
    for (shape, place), by_parent in children.items():
        parents = arrays[place].units
        common = min(len(by_parent.get(parent, ())) for parent in parents)
        more = sum(len(found) > common for found in by_parent.values())
        if common == 0 or common + more >= len(by_parent):
            continue
        ordered = {p: sorted(found, key=lambda n: (-units[n].rank, n)) for p, found in by_parent.items()}
        for turn in range(common):
            made.append(Array(tuple(ordered[p][turn] for p in parents), shape, corresponds=place))
    return made


def summary(stages: Sequence[Stage], options: SlurmOptions) -> str:
    """What would be submitted, for a person: `Jobs: 8 in 4 arrays: 1 × …, 7 × ….`"""
    shapes = {stage.id: shape_of(stage, options) for stage in stages}
    units = units_of(stages, shapes, {name: options.resources(name) for name in set(CLASSES.values())}, {})
    arrays = arrays_of(units, max(1, len(units)))
    counts = Counter(unit.shape.line() for unit in units)
    parts = ", ".join(f"{count} × {shape}" for shape, count in counts.items())
    return f"Jobs: {len(units)} in {len(arrays)} arrays: {parts}."
