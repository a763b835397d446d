"""What a store holds, in a person's words: stages with the studies that name them, and what takes the room."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from zexp.config.tokens import say_tokens
from zexp.store import sizes
from zexp.store.folder import KINDS
from zexp.store.inventory import Inventory, Seen
from zexp.store.sizes import Size
from zexp.study import gc
from zexp.study.recorded import Record

STATUSES = ("running", "failed", "diverged", "missing", "done")
SHOWN_STATES, SHOWN_LABELS = 4, 3


@dataclass
class Row:
    """One stage of a store, or one that a study names and the store lacks (seen is None).

    labels: what the studies call it, else what can be told from the folder; studies: whose current revision names it; earlier: whose earlier one does;
    below: it is named by no study, and something that one names is made from it.
    """

    key: str
    labels: list[str]
    studies: list[str]
    earlier: list[str]
    status: str
    seen: Seen | None
    below: bool = False

    @property
    def kind(self) -> str:
        return self.key.partition("/")[0]

    @property
    def id(self) -> str:
        return self.key.partition("/")[2]

    @property
    def orphan(self) -> bool:
        return not (self.studies or self.earlier or self.below)

    @property
    def label(self) -> str:
        more = len(self.labels) - SHOWN_LABELS
        return " · ".join(self.labels[:SHOWN_LABELS]) + (f" and {more} more" if more > 0 else "")

    @property
    def holds(self) -> str:
        """Its states, or whether its result is there, in a few words."""
        seen = self.seen
        if seen is None:
            return ""
        if seen.folder.kind != "trajectory":
            return "result" if seen.result else "result elsewhere" if seen.told else "no result"
        words = [
            ("~" if state.rolling else "") + say_tokens(tokens) + ("" if state.trainable else " weights")
            for tokens, state in sorted(seen.states.items())
        ]
        text = _some(words, "states")
        elsewhere = _some([say_tokens(tokens) for tokens in seen.elsewhere], "states")
        text = "; ".join([*([text] if text else []), *([f"{elsewhere} elsewhere"] if elsewhere else [])])
        return text or "no state"

    def to_json(self) -> dict[str, Any]:
        seen = self.seen
        return {
            "id": self.id,
            "kind": self.kind,
            "labels": self.labels,
            "studies": self.studies,
            "earlier_revisions": self.earlier,
            "orphan": self.orphan,
            "status": self.status,
            "result": None if seen is None or self.kind == "trajectory" else seen.result,
            "states": [
                {"tokens": t, "optimizer": s.trainable, "rolling": s.rolling, "bytes": (s.size + s.optimizer).to_json()}
                for t, s in sorted(seen.states.items())
            ]
            if seen is not None
            else [],
            "elsewhere": list(seen.elsewhere) if seen is not None else [],
            "bytes": (seen.size if seen is not None else Size()).to_json(),
            "made": seen.made if seen is not None else None,
            "used": seen.used if seen is not None else None,
        }


def rows(inventory: Inventory, records: list[Record], study: str | None = None, kind: str | None = None) -> list[Row]:
    """The stages in a store, or those of one study, by kind, label and id; those that a current study lacks among them."""
    made = {key: Row(key, [], [], [], "", seen) for key, seen in inventory.stages.items()}
    cuts: dict[str, set[int]] = {}
    for record in records:
        for stage in record.listed["stages"]:
            key = stage["folder"]
            if key not in made:
                if not record.current:
                    continue
                made[key] = Row(key, [], [], [], "", None)
            row = made[key]
            names = row.studies if record.current else row.earlier
            if record.study not in names:
                names.append(record.study)
            label = stage.get("label") or stage.get("phase") or ""
            if label and label not in row.labels:
                row.labels.append(label)
            if stage["kind"] == "segment" and record.current:
                cuts.setdefault(key, set()).add(stage["to"])
    below = inventory.closure(key for record in records for key in record.folders)
    for key, row in made.items():
        row.below = key in below and not row.studies and not row.earlier
        row.earlier = [name for name in row.earlier if name not in row.studies]
        row.status = _status(row.seen, cuts.get(key, set()))
        if not row.labels and row.seen is not None:
            row.labels.append(_told(inventory, row.seen))
    wanted = [
        row
        for row in made.values()
        if (study is None or study in row.studies or study in row.earlier) and (kind is None or row.kind == kind)
    ]
    return sorted(wanted, key=lambda row: (KINDS.index(row.kind), row.orphan, row.labels, row.id))


def _told(inventory: Inventory, seen: Seen) -> str:
    """What a stage is that no study names, from its semantic block and its last attempt."""
    kind, semantic = seen.folder.kind, seen.semantic
    if kind == "trajectory":
        parent = semantic.get("parent")
        return seen.called or (f"goes on from {parent['id'][:16]}@{parent['tokens']}" if parent else "pretraining")
    if kind == "eval":
        state, task = semantic.get("state") or {}, semantic.get("task")
        trained = inventory.stages.get(f"trajectory/{str(state.get('id'))[:16]}")
        model = (trained.called if trained is not None else "") or str(state.get("id"))[:16]
        return f"{model} {task.get('name') if isinstance(task, dict) else task}"
    if kind == "tasks":
        return f"tasks {semantic.get('task')}"
    if kind == "corpus":
        source = semantic.get("source") or {}
        return f"corpus {source.get('kind', '')} {source.get('view') or source.get('path') or ''}".strip()
    return f"{kind}, {semantic['seq_len']} a sequence" if "seq_len" in semantic else kind


def _status(seen: Seen | None, cuts: set[int]) -> str:
    """running, done, diverged, failed, missing. A trajectory is done when every current study's token count is reached."""
    if seen is None:
        return "missing"
    if seen.folder.kind == "trajectory":
        reached = max([*seen.states, *seen.elsewhere], default=-1)
        done = reached >= max(cuts, default=0)
    else:
        done = seen.told
    if seen.holder is not None and not done:
        return "running"
    if done:
        return "done"
    if seen.diverged is not None:
        return "diverged"
    return "failed" if seen.failed else "missing"


def _some(words: list[str], what: str) -> str:
    if len(words) <= SHOWN_STATES:
        return ", ".join(words)
    return f"{len(words)} {what}: {words[0]}, … {', '.join(words[1 - SHOWN_STATES :])}"


@dataclass
class Usage:
    """kinds: kind -> (stages, size). studies: name -> (all of its stages, those that no other study names).

    freeable: what could be freed, in words -> size; a thing is in one of them only. other: what is no stage's.
    """

    total: Size
    kinds: dict[str, tuple[int, Size]]
    states: dict[str, Size]
    studies: dict[str, tuple[Size, Size]]
    freeable: dict[str, Size]
    other: dict[str, Size]

    def to_json(self) -> dict[str, Any]:
        return {
            "bytes": self.total.to_json(),
            "kinds": {kind: {"stages": n, "bytes": size.to_json()} for kind, (n, size) in self.kinds.items()},
            "trajectories": {part: size.to_json() for part, size in self.states.items()},
            "studies": {
                name: {"bytes": whole.to_json(), "exclusive": own.to_json()} for name, (whole, own) in self.studies.items()
            },
            "freeable": {what: size.to_json() for what, size in self.freeable.items()},
            "other": {name: size.to_json() for name, size in self.other.items()},
        }


def usage(inventory: Inventory, records: list[Record], study: str | None = None) -> Usage:
    """What takes the room; of one study: of its stages alone."""
    chosen = [record for record in records if study is None or record.study == study]
    if study is not None:
        named = inventory.closure(key for record in chosen for key in record.folders)
        inventory = Inventory(inventory.store, {key: inventory.stages[key] for key in inventory.stages if key in named})
    stages = inventory.stages.values()
    kinds = {}
    for kind in KINDS:
        of_kind = [seen.size for seen in stages if seen.folder.kind == kind]
        if of_kind:
            kinds[kind] = (len(of_kind), sizes.total(of_kind))
    states = [state for seen in stages for state in seen.states.values()]
    parts = {"weights": sizes.total([state.size for state in states]), "optimizers": sizes.total([s.optimizer for s in states])}
    other = dict(inventory.others) | {f"{stray.path.parent.name}/{stray.path.name}": stray.size for stray in inventory.strays}
    total = sizes.total([*(size for _, size in kinds.values()), *other.values(), *inventory.leftovers.values()])
    return Usage(total, kinds, parts, _by_study(inventory, records, study), _freeable(inventory, records), other)


def _by_study(inventory: Inventory, records: list[Record], study: str | None) -> dict[str, tuple[Size, Size]]:
    """Of each study its stages with all that they are made from, earlier revisions included."""
    named: dict[str, set[str]] = {}
    for record in records:
        named.setdefault(record.study, set()).update(inventory.closure(record.folders))
    result = {}
    for name, own in named.items():
        if study is None or name == study:
            others: set[str] = set().union(*(keys for other, keys in named.items() if other != name))
            whole, alone = (
                sizes.total([inventory.stages[key].size for key in keys]) for keys in (own, own - others)
            )
            result[name] = (whole, alone)
    return result


def _freeable(inventory: Inventory, records: list[Record]) -> dict[str, Size]:
    """What `gc` could free with all its options, and what else is not needed to go on."""
    current = [record for record in records if record.current]
    now = time.time()
    plain = gc.decide(inventory, records, gc.Options(young=0.0, orphans=True), now)
    fewer = gc.decide(inventory, current, gc.Options(young=0.0, orphans=True), now)
    result: dict[str, Size] = {}
    for drop in plain.drops:
        result[gc.WHY[drop.reason]] = result.get(gc.WHY[drop.reason], Size()) + drop.size
    earlier = sizes.total([d.size for d in fewer.drops if (d.stage, d.place) not in plain.places])
    aside = [size for seen in inventory.stages.values() for size in seen.set_aside.values()]
    logs = [seen.parts["attempts"] for seen in inventory.stages.values() if "attempts" in seen.parts]
    result["stages and states of earlier revisions alone"] = earlier
    result["damaged ones that verify set aside"] = sizes.total(aside)
    result["logs and metrics of attempts (reports read them)"] = sizes.total(logs)
    result["cache/ (may be deleted at any time)"] = inventory.others.get("cache", Size())
    return {what: size for what, size in result.items() if size.files or size.disk}
