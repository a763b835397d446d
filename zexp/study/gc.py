"""What may go from a store: decided from the recorded studies alone, checked by planning them all again, then done.

Kept, whatever else is asked for:
- what a study names (its current revision or one that counts) and all that is made from, down to the tokenizer;
- states: cuts and forks of studies, pinned ones, the ladder, the newest two rolling ones, the nearest state that a named
  one which is not there would be trained again from; parts that training reads of these;
- what is younger than an hour, what a live process holds, and what either is made from.

No rule is trusted alone: the plans of all studies must ask for the same work with what is to go as without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zexp.store import trash
from zexp.store.errors import StoreError
from zexp.store.folder import KINDS, OPTIMIZER
from zexp.store.inventory import Inventory, Seen, SeenState
from zexp.store.retention import superfluous
from zexp.store.sizes import Size
from zexp.store.snapshot import Snapshot
from zexp.study import plan as plans
from zexp.study import recorded
from zexp.study.recorded import Record

YOUNG_SECONDS = 3600.0  # a run makes folders before other machines are sure to see its study
DAY = 86400.0

# Why something may go; the order in which it is said.
LEFTOVERS = "left over"
ROLLING = "rolling"
OPTIMIZERS = "optimizer"
LADDER = "off the ladder"
PINS = "pin"
ORPHANED_STATE = "state of no study"
ORPHAN = "orphan"
WHY = {
    LEFTOVERS: "trash, and temporaries of attempts that ended",
    ROLLING: "rolling states but the newest two",
    OPTIMIZERS: "optimizers of scored ends that no study goes on from",
    LADDER: "states on no study's ladder",
    PINS: "pins of removed studies",
    ORPHANED_STATE: "states that only removed studies named",
    ORPHAN: "stages that no study names",
}


@dataclass(frozen=True)
class Options:
    """orphans: what no study names may go. revisions: how many earlier revisions of a study count as naming (None: all
    that are kept). older: seconds since it was last used, for stages and states. young: seconds that a stage is left
    alone after it was made.
    """

    orphans: bool = False
    revisions: int | None = None
    older: float = 0.0
    young: float = YOUNG_SECONDS


@dataclass(frozen=True)
class Drop:
    """One thing that may go. stage: kind/hash16, "" outside of stages; place: in its folder, "" for all of it.

    again: tokens that have to be trained if it is wanted again.
    """

    reason: str
    stage: str
    place: str
    path: Path
    size: Size
    again: int = 0

    def to_json(self, root: Path) -> dict[str, Any]:
        return {
            "reason": self.reason,
            "stage": self.stage,
            "path": self.path.relative_to(root).as_posix(),
            "bytes": self.size.to_json(),
            "tokens_to_train_again": self.again,
        }


@dataclass
class Decision:
    """drops: in an order in which nothing goes before what was made from it. skipped: stage -> why it is left alone.

    again: tokens to train if all of it is wanted again; less than the sum of the drops' where these overlap.
    """

    drops: list[Drop]
    skipped: dict[str, str]
    again: int

    @property
    def places(self) -> set[tuple[str, str]]:
        return {(drop.stage, drop.place) for drop in self.drops}


@dataclass
class Wanted:
    """What records ask for. cuts, ladder: by stage; whole: states whose optimizer is read; ends: those that are only scored."""

    stages: set[str] = field(default_factory=set)
    cuts: dict[str, set[int]] = field(default_factory=dict)
    ladder: dict[str, set[int]] = field(default_factory=dict)
    whole: set[tuple[str, int]] = field(default_factory=set)
    ends: set[tuple[str, int]] = field(default_factory=set)
    unsaid: set[str] = field(default_factory=set)  # trajectories of which an old record does not say what it keeps whole


def wanted(records: Iterable[Record], snapshot: Snapshot) -> Wanted:
    """What the records' studies name, fork, score, and would resume from."""
    found = Wanted()
    scored: dict[tuple[str, int], bool] = {}
    for record in records:
        plan = recorded.plan(record, snapshot)
        keeps_whole, evals = record.keeps_whole, plan.evals_of()
        forked = plan.forked()
        for stage in plan.stages.values():
            found.stages.add(stage.folder)
            if stage.kind != "segment":
                continue
            assert stage.to is not None
            found.cuts.setdefault(stage.folder, set()).add(stage.to)
            if keeps_whole is None:
                found.unsaid.add(stage.folder)
            if stage.id in forked or (keeps_whole and keeps_whole & set(stage.variants)):
                found.whole.add((stage.folder, stage.to))
            if stage.needed and stage.resume_from is not None:
                found.whole.add((stage.folder, stage.resume_from))
            seen = snapshot.seen.get(stage.folder)
            if seen is not None and "batch" in seen.semantic:
                step = seen.semantic["batch"][-1]["tokens"]
                found.ladder.setdefault(stage.folder, set()).update(plans.ladder(seen.start, stage.to, step))
        for stage in plan.scored_ends():
            assert stage.to is not None
            done = all(one.cached for one in evals[stage.id])
            scored[stage.folder, stage.to] = scored.get((stage.folder, stage.to), True) and done
    found.ends = {end for end, done in scored.items() if done}
    return found


def decide(inventory: Inventory, records: list[Record], options: Options, now: float) -> Decision:
    """What may go. now: seconds since 1970. Raises StoreError if a rule here would cost a study training."""
    snapshot = Snapshot.of(inventory)
    asked = wanted(records, snapshot)
    decider = _Decider(inventory, asked, options, now)
    decision = decider.decide()
    _check(records, snapshot, decision)
    return decision


class _Decider:
    def __init__(self, inventory: Inventory, asked: Wanted, options: Options, now: float):
        self.inventory, self.asked, self.options, self.now = inventory, asked, options, now
        self.skipped: dict[str, str] = {}
        self.drops: list[Drop] = []
        self.named = inventory.closure(asked.stages)
        self.staying = self._staying()
        self.read = self._read_by_others()

    def decide(self) -> Decision:
        again = 0
        for key in self.inventory.stages:
            if key not in self.staying:
                again += self._orphan(self.inventory.stages[key])
        self.drops.sort(key=self._children_first)
        for seen in self.inventory.stages.values():
            if seen.key in self.staying and seen.key not in self.skipped:
                self._leftovers(seen)
                if seen.folder.kind == "trajectory":
                    again += self._states(seen)
        for path, size in self.inventory.leftovers.items():
            if not trash.in_use(Path(path)) and self._is_old(Path(path)):
                self.drops.append(Drop(LEFTOVERS, "", Path(path).name, Path(path), size))
        skipped = {key: why for key, why in self.skipped.items() if key in self.inventory.stages}
        return Decision(self.drops, skipped, again)

    def _staying(self) -> set[str]:
        """Stages that stay, with all that they are made from. Fills skipped: of these nothing goes at all."""
        stays = set(self.named)
        for key, seen in self.inventory.stages.items():
            if seen.holder is not None:
                self.skipped[key] = trash.said(seen.holder)
            elif self.now - seen.made < self.options.young:
                self.skipped[key] = f"it was made less than {self.options.young / 60:.0f} minutes ago"
            if key in self.skipped or not self.options.orphans or self.now - seen.used < self.options.older:
                stays.add(key)
        return self.inventory.closure(stays)

    def _read_by_others(self) -> dict[tuple[str, int], bool]:
        """States that stages which stay are made from: (stage, tokens) -> whether the optimizer is read."""
        found: dict[tuple[str, int], bool] = {}
        for key in self.staying:
            semantic = self.inventory.stages[key].semantic
            for name, with_optimizer in (("parent", semantic.get("optimizer_state") == "carry"), ("state", False)):
                state = semantic.get(name)
                if isinstance(state, Mapping) and (name == "parent" or key not in self.named):
                    place = (f"trajectory/{state['id'][:16]}", int(state["tokens"]))
                    found[place] = found.get(place, False) or with_optimizer
        return found

    def _orphan(self, seen: Seen) -> int:
        states = sorted(seen.states)
        again = states[-1] - seen.start if states else 0
        self.drops.append(Drop(ORPHAN, seen.key, "", seen.folder.path, seen.size, again))
        return again

    def _children_first(self, drop: Drop) -> tuple[int, int]:
        depth, key = 0, drop.stage
        while key in self.inventory.stages and (parent := self.inventory.stages[key].semantic.get("parent")):
            depth, key = depth + 1, f"trajectory/{parent['id'][:16]}"
        return -KINDS.index(drop.stage.partition("/")[0]), -depth

    def _leftovers(self, seen: Seen) -> None:
        made_again = {path for path in seen.set_aside if _made_again(seen, Path(path).name)}
        for path, size in [*seen.leftovers.items(), *((path, seen.set_aside[path]) for path in sorted(made_again))]:
            if Path(path).is_file() and not self._is_old(Path(path)):
                continue  # a file that is being written, by somebody who needs no lease for it
            place = Path(path).relative_to(seen.folder.path).as_posix()
            self.drops.append(Drop(LEFTOVERS, seen.key, place, Path(path), size))

    def _states(self, seen: Seen) -> int:
        """Decide on a trajectory's states. Returns tokens to train if all that go are wanted again."""
        key, asked = seen.key, self.asked
        cuts, ladder = asked.cuts.get(key, set()), asked.ladder.get(key, set())
        backed = cuts | {tokens for (stage, tokens) in self.read if stage == key}
        pins = {tokens for tokens in seen.pins if tokens in backed or not self.options.orphans}
        whole = {tokens for (stage, tokens) in asked.whole if stage == key}
        keep = backed | pins | whole | self._ancestors(seen, cuts, whole)
        rolling = [tokens for tokens, state in seen.states.items() if state.rolling]
        reasons: dict[int, str] = dict.fromkeys(superfluous(rolling, keep, newest=seen.keeps_rolling), ROLLING)
        for tokens, state in seen.states.items():
            if state.rolling or tokens in keep or tokens in ladder:
                continue
            if tokens in seen.pins or not cuts or tokens > max(cuts):
                if self.options.orphans:
                    reasons[tokens] = ORPHANED_STATE
            else:
                reasons[tokens] = LADDER
        reasons = {t: why for t, why in reasons.items() if self.now - seen.states[t].made >= self.options.older}
        stay = [state for tokens, state in seen.states.items() if tokens not in reasons]
        light = [state for state in stay if self._may_lose_optimizer(seen, state, whole)]
        light = [state for state in light if self.now - state.made >= self.options.older]
        trainable = [state.tokens for state in stay if state.trainable and state not in light]
        for tokens, why in sorted(reasons.items()):
            state = seen.states[tokens]
            again = tokens - _before(trainable, tokens, seen.start)
            self.drops.append(Drop(why, key, f"states/{tokens}", state.path, state.size + state.optimizer, again))
        for state in light:
            again = state.tokens - _before(trainable, state.tokens, seen.start)
            place = f"states/{state.tokens}/{OPTIMIZER}"
            self.drops.append(Drop(OPTIMIZERS, key, place, state.path / OPTIMIZER, state.optimizer, again))
        if self.options.orphans:
            self._pins(seen, backed, whole)
        last: dict[int, int] = {}
        for tokens in [*reasons, *(state.tokens for state in light)]:
            base = _before(trainable, tokens, seen.start)
            last[base] = max(last.get(base, 0), tokens - base)
        return sum(last.values())

    def _ancestors(self, seen: Seen, cuts: set[int], whole: set[int]) -> set[int]:
        """Of each named state that is not there, or will be weights only, the one that it would be trained again from."""
        trainable = [t for t, s in seen.states.items() if s.trainable and not self._may_lose_optimizer(seen, s, whole)]
        found = {_before(trainable, tokens, -1) for tokens in cuts if tokens not in trainable}
        return found - {-1}

    def _may_lose_optimizer(self, seen: Seen, state: SeenState, whole: set[int]) -> bool:
        """retention.drop_optimizer's rule for an end that is scored."""
        key, tokens = seen.key, state.tokens
        return (
            (key, tokens) in self.asked.ends
            and state.trainable
            and state.droppable
            and tokens not in whole
            and not self.read.get((key, tokens), False)
            and not (tokens in seen.optimizer_pins and (key in self.asked.unsaid or not self.options.orphans))
        )

    def _pins(self, seen: Seen, backed: set[int], whole: set[int]) -> None:
        """Pins of no study that counts. (Others are right as they are: each run sets its own.)"""
        for tokens in seen.pins:
            place = f"pins/{tokens}"
            if tokens not in backed:
                self.drops.append(Drop(PINS, seen.key, place, seen.folder.path / place, Size()))
        for tokens in seen.optimizer_pins:
            place = f"pins/{tokens}.{OPTIMIZER}"
            read = tokens in whole or self.read.get((seen.key, tokens), False)
            if not read and seen.key not in self.asked.unsaid:
                self.drops.append(Drop(PINS, seen.key, place, seen.folder.path / place, Size()))

    def _is_old(self, path: Path) -> bool:
        try:
            return self.now - path.stat().st_mtime >= self.options.young or path.parent.name == trash.TRASH
        except FileNotFoundError:
            return False


def _before(trainable: list[int], tokens: int, start: int) -> int:
    return max((t for t in trainable if t < tokens), default=start)


def _made_again(seen: Seen, name: str) -> bool:
    """damaged-states-64-1a2b… or damaged-result-1a2b…: whether that is in its place again."""
    parts = name.split("-")
    if parts[1] == "states":
        return int(parts[2]) in seen.states
    return seen.result


def _check(records: list[Record], snapshot: Snapshot, decision: Decision) -> None:
    gone: dict[str, set[str]] = {}
    for drop in decision.drops:
        gone.setdefault(drop.stage, set()).add(drop.place)
    left = snapshot.without(gone)
    for record in records:
        before, after = (_work(recorded.plan(record, one)) for one in (snapshot, left))
        if before != after:
            more = sorted(id for id in after if after[id] > before.get(id, -1))
            raise StoreError(
                f"Deleting this would cost the study {record} {sum(after.values()) - sum(before.values()):,} tokens of training "
                f"(stage {more[0] if more else '?'}). Nothing was deleted. This is a mistake in zexp: please report it."
            )


def _work(plan: plans.Plan) -> dict[str, int]:
    return {stage.id: stage.to_train for stage in plan.to_do}


@dataclass
class Done:
    """What carry_out did. restored: places that a study asked for meanwhile; skipped: stage -> why."""

    dropped: list[Drop] = field(default_factory=list)
    restored: list[Drop] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def freed(self) -> int:
        return sum(drop.size.disk for drop in self.dropped)


def carry_out(
    inventory: Inventory,
    decision: Decision,
    options: Options,
    stamp: Mapping[str, Any],
    on_done: Callable[[Drop], None] | None = None,
) -> Done:
    """Delete what was decided, stage by stage, each under its lease; stages that somebody works in are skipped.

    stamp: recorded.stamp() from before the records were read. A study that is recorded meanwhile is seen here after
    something was renamed and before it is deleted: what it wants is put back. (It is recorded before it looks at the
    store for the last time, so either it is seen here, or it sees that the thing is gone.)
    """
    made = Done()
    by_stage: dict[str, list[Drop]] = {}
    for drop in decision.drops:
        by_stage.setdefault(drop.stage, []).append(drop)
    rules = _Rules(inventory, decision, options, dict(stamp))
    blocked: set[str] = set()
    for stage, drops in by_stage.items():
        if stage in blocked and drops[0].place == "":
            made.skipped[stage] = "something is made from it that could not go"
            continue
        if not stage:
            for drop in drops:
                trash.delete(drop.path)
                _note(made, drop, on_done)
            continue
        seen = inventory.stages[stage]
        try:
            with trash.held(seen.folder) as lease:
                lease.check(fresh=True)
                if drops[0].place == "":
                    lease.stop()  # the file that it beats in goes away with the folder
                moved = [(drop, one) for drop in drops if (one := _move(seen, drop)) is not None]
                allowed = rules.now()
                for drop, one in moved:
                    if (drop.stage, drop.place) in allowed or drop.reason == LEFTOVERS:
                        trash.delete(one.now)
                        _note(made, drop, on_done)
                    else:
                        _back(one)
                        made.restored.append(drop)
                        blocked |= inventory.closure([stage])
        except trash.Busy as busy:
            made.skipped[stage] = str(busy)
            blocked |= inventory.closure([stage]) - {stage}
    return made


@dataclass
class _Rules:
    """What may still go, decided again when a study was recorded, changed or removed."""

    inventory: Inventory
    decision: Decision
    options: Options
    stamp: dict[str, Any]

    def now(self) -> set[tuple[str, str]]:
        stamp = recorded.stamp(self.inventory.store)
        if stamp != self.stamp:
            records = recorded.records(self.inventory.store, self.options.revisions)
            again = decide(self.inventory, records, self.options, time.time())
            self.decision = Decision([d for d in self.decision.drops if (d.stage, d.place) in again.places], {}, 0)
            self.stamp = stamp
        return self.decision.places


def _move(seen: Seen, drop: Drop) -> trash.Aside | None:
    try:
        if drop.place == "":
            return trash.away(seen.folder.store, drop.path, drop.stage.replace("/", "-"))
        if drop.reason == LEFTOVERS and drop.path.name != "tmp":
            return trash.Aside(drop.path, drop.path)  # nobody looks at it where it is
        return trash.aside(seen.folder, drop.path)
    except FileNotFoundError:
        return None  # the run that had it took it away itself


def _back(one: trash.Aside) -> None:
    if trash.back(one):
        return
    # A run has made the folder anew and trains again: what it has not made yet is put into its place.
    for place in ["result", *(f"states/{path.name}" for path in (one.now / "states").glob("*"))]:
        if (one.now / place).is_dir() and not (one.was / place).exists():
            (one.was / place).parent.mkdir(exist_ok=True)
            trash.back(trash.Aside(one.was / place, one.now / place))
    trash.delete(one.now)


def _note(made: Done, drop: Drop, on_done: Callable[[Drop], None] | None) -> None:
    made.dropped.append(drop)
    if on_done is not None:
        on_done(drop)
