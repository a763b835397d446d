"""`zexp plan --why A B`: the semantic keys in which two stages differ; of one stage, against what the store has instead.

A parent that differs is explained by its own difference, down to the root and to the data, so that no id is listed whose
reason can be said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from zexp.config.errors import ConfigError
from zexp.config.schema import Run
from zexp.store import files
from zexp.store.folder import Store
from zexp.store.ids import short
from zexp.study import names
from zexp.study.catalogue import Catalogue
from zexp.study.differ import Difference, differences, say
from zexp.study.nearest import Finder, kind_of
from zexp.study.plan import Plan
from zexp.study.variants import GROUPS

# The last part of a key whose value is another stage's id -> its kind.
REFERENCES = {"id": "trajectory", "replay": "trajectory", "packing": "packing", "tokenizer": "tokenizer", "corpus": "corpus", "tasks": "tasks"}
ANY_NUMBER = 1000  # of keys


@dataclass(frozen=True)
class Asked:
    """What stands behind --why. composed_first: a name means a variant of the composed study before one of the store."""

    a: str
    b: str | None
    composed_first: bool


@dataclass(frozen=True)
class Side:
    """A stage that is compared. said: how it was named; tokens: of a state; finished: whether the store has it."""

    said: str
    kind: str
    id: str
    tokens: int | None
    finished: bool

    def __str__(self) -> str:
        return short(self.id) + ("" if self.tokens is None else f"@{self.tokens}")

    def to_json(self) -> dict[str, Any]:
        return {"said": self.said, "kind": self.kind, "id": str(self), "in_store": self.finished}


@dataclass(frozen=True)
class Answer:
    """differences: with the stages in which they stand, from the root down; shared_tokens: up to which two trajectories are one."""

    a: Side
    b: Side | None
    differences: list[tuple[list[str], Difference]] = field(default_factory=list)
    shared_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "a": self.a.to_json(),
            "b": None if self.b is None else self.b.to_json(),
            "equal": self.b is not None and self.a.id == self.b.id,
            "shared_tokens": self.shared_tokens,
            "differences": [{"stages": stages, **one.to_json()} for stages, one in self.differences],
        }


def asked(words: list[str]) -> tuple[Asked | None, list[str]]:
    """--why A [B] taken out of a command line. Raises ConfigError if it names nothing."""
    if "--why" not in words:
        return None, words
    at = words.index("--why")
    given = [word for word in words[at + 1 : at + 3] if not word.startswith("-")]
    count = next((n for n, word in enumerate(given) if _is_override(word)), len(given))
    if not count:
        raise ConfigError(
            "--why needs one or two stages: a variant's name, STUDY/VARIANT, or the beginning of an id (perhaps with @tokens)."
        )
    rest = words[:at] + words[at + 1 + count :]
    composed = any(not word.startswith(("store=", "hydra", "-")) for word in rest)
    return Asked(given[0], given[1] if count > 1 else None, composed), rest


def _is_override(word: str) -> bool:
    """A word that sets a key of the config. (A variant may be called weight_decay=0.1: no key of the root is.)"""
    key, equals, _ = word.partition("=")
    root = key.lstrip("+~").replace("@", ".").replace("/", ".").partition(".")[0]
    return word[0] in "+~" or (bool(equals) and "," not in key and root in {*Run.__dataclass_fields__, *GROUPS, "hydra"})


def why(question: Asked, plan: Plan, store: Store) -> Answer:
    """Raises ConfigError for names that mean no stage, or several, and for two kinds of stage."""
    return Explainer(plan, store).answer(question)


@dataclass
class Explainer:
    """Looks stages up in a plan and a store."""

    plan: Plan
    store: Store

    def __post_init__(self) -> None:
        self.finder = Finder(Catalogue(self.store))
        self._planned = {(kind_of(stage), stage.full_id): stage.semantic for stage in self.plan.stages.values()}
        self._labels = self._recorded_labels()
        self._labels |= {stage.folder: stage.label for stage in self.plan.stages.values()}

    def answer(self, question: Asked) -> Answer:
        a = self._side(question.a, question.composed_first)
        if question.b is None:
            return self._against_the_store(a)
        b = self._side(question.b, question.composed_first)
        if a.kind != b.kind:
            raise ConfigError(
                f"{question.a!r} is of the kind {a.kind} and {question.b!r} of the kind {b.kind}: name two stages of one kind."
            )
        return self._compared(a, b)

    # Names

    def _side(self, said: str, composed_first: bool) -> Side:
        found = self._of_plan(said) if composed_first else None
        if found is None:
            try:
                return self._of_store(said)
            except ConfigError as error:
                found = None if composed_first else self._of_plan(said)
                if found is None:
                    known = ", ".join(variant.name for variant in self.plan.variants[:8])
                    raise ConfigError([*error.problems, f"{said!r} names no variant of the composed study either: {known}."]) from error
        return found

    def _of_plan(self, said: str) -> Side | None:
        ids = {self.plan.segments[v.name][-1] for v in self.plan.variants if said in (v.name, v.row)}
        ids = ids or {stage.id for stage in self.plan.stages.values() if stage.label == said}
        begun, at, tokens = said.partition("@")
        if not ids and len(begun) >= 4 and set(begun) <= set("0123456789abcdef"):
            stages = [stage for stage in self.plan.stages.values() if stage.full_id.startswith(begun)]
            ids = {stage.id for stage in stages if not at or str(stage.to) == tokens}
            if len({stage.full_id for stage in stages if stage.id in ids}) == 1:  # one trajectory, cut at several counts
                ids = {max(ids, key=lambda id: self.plan.stages[id].to or 0)}
        if len(ids) > 1:
            candidates = ", ".join(f"{id} ({self.plan.stages[id].label})" for id in sorted(ids)[: names.SHOWN])
            raise ConfigError(f"{said!r} names {len(ids)} stages of the composed study: {candidates}. Name one.")
        return self._planned_side(said, ids.pop()) if ids else None

    def _planned_side(self, said: str, id: str) -> Side:
        stage = self.plan.stages[id]
        return Side(said, kind_of(stage), stage.full_id, stage.to, stage.cached)

    def _of_store(self, said: str) -> Side:
        folder = names.stage(self.store, said)
        tokens: int | None = None
        if folder.kind == "trajectory":
            _, _, typed = (names.stage_id(self.store, said) or said).partition("@")
            states = folder.states()
            tokens = int(typed) if typed.isdigit() else max(states, default=None)
            return Side(said, folder.kind, folder.id, tokens, tokens in states)
        return Side(said, folder.kind, folder.id, None, folder.result is not None)

    # One stage

    def _against_the_store(self, a: Side) -> Answer:
        """What has to be made for a stage and could be expected to be there, or itself, against its nearest in the store."""
        first = self._first_missing(a)
        semantic = self._semantic(first.kind, first.id)
        assert semantic is not None, "it was looked up"
        own = frozenset([short(first.id)])
        found = self.finder.near(first.kind, semantic, own, most=ANY_NUMBER)
        found = found or self.finder.near(first.kind, semantic, own, most=ANY_NUMBER, anchored=False)
        if found is None:
            return Answer(first, None)
        name, _, tokens = found[0].partition("@")
        full = self.finder.catalogue.of(first.kind)[name].id
        return self._compared(first, Side("nearest", first.kind, full, int(tokens) if tokens else None, True))

    def _first_missing(self, a: Side) -> Side:
        """The first stage on the way to a planned one that is not in the store; itself if all are, or of the store's own."""
        ends = [stage.id for stage in self.plan.stages.values() if stage.full_id == a.id and stage.to == a.tokens]
        way = list(self._above(ends[0], {})) if ends else []
        missing = next((id for id in way if self.plan.stages[id].needed), None)
        return a if missing is None else self._planned_side(a.said, missing)

    def _above(self, id: str, seen: dict[str, None]) -> Iterator[str]:
        """A planned stage and all that it needs, parents first."""
        if id in seen:
            return
        seen[id] = None
        for parent in self.plan.stages[id].parents:
            yield from self._above(parent, seen)
        yield id

    # Differences

    def _compared(self, a: Side, b: Side) -> Answer:
        merged: dict[str, tuple[list[str], Difference]] = {}
        for where, one in self._explained(a.kind, a.id, b.id, set()):
            stages, _ = merged.setdefault(repr(one), ([], one))
            if where not in stages:
                stages.append(where)
        return Answer(a, b, list(merged.values()), self._shared(a, b))

    def _explained(self, kind: str, a: str, b: str, seen: set[tuple[str, str]]) -> Iterator[tuple[str, Difference]]:
        """(stage, difference) of two stages and of what they are made from, parents first."""
        if a == b or (a, b) in seen:
            return
        seen.add((a, b))
        pairs = [(a, b)]
        if kind == "trajectory":
            chains = self._chain(a), self._chain(b)
            pairs = list(zip(*chains, strict=False))
            longer = max(chains, key=len)
            for id in longer[len(pairs) :]:
                sides = ("absent", short(id)) if longer is chains[1] else (short(id), "absent")
                yield self._where(kind, id), Difference("segment", *sides)
        for mine, other in pairs:
            block, other_block = self._semantic(kind, mine), self._semantic(kind, other)
            if mine == other or block is None or other_block is None:
                continue
            where = self._where(kind, mine)
            seen.add((mine, other))
            own: list[Difference] = []
            for one in differences(block, other_block):
                refers_to = REFERENCES.get(one.leaf.rpartition(".")[2])
                if refers_to is not None and self._are_known(refers_to, one.a, one.b):
                    yield from self._explained(refers_to, one.a, one.b, seen)
                else:
                    own.append(one)
            for one in own:
                yield where, one

    def _are_known(self, kind: str, a: Any, b: Any) -> bool:
        return all(isinstance(id, str) and len(id) == 64 and self._semantic(kind, id) is not None for id in (a, b))

    def _chain(self, id: str) -> list[str]:
        """The ids of a trajectory's segments, the root first, as far as they are known."""
        found = [id]
        while (semantic := self._semantic("trajectory", found[0])) is not None and semantic["parent"] is not None:
            found.insert(0, semantic["parent"]["id"])
        return found

    def _shared(self, a: Side, b: Side) -> int:
        """Tokens up to which two trajectories are the same."""
        if a.kind != "trajectory":
            return 0
        one, other = self._chain(a.id), self._chain(b.id)
        common = next((n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other)))
        if common == 0:
            return 0
        ends = []
        for chain, side in ((one, a), (other, b)):
            semantic = self._semantic("trajectory", chain[common]) if common < len(chain) else None
            ends.append(semantic["parent"]["tokens"] if semantic is not None else side.tokens or 0)
        return min(ends)

    def _semantic(self, kind: str, id: str) -> dict[str, Any] | None:
        planned = self._planned.get((kind, id))
        if planned is not None:
            return planned
        folder = self.store.folder(kind, id)
        return folder.semantic() if (folder.path / "config.yaml").is_file() else None

    def _where(self, kind: str, id: str) -> str:
        """A stage's label without the variant that owns it; its folder if no study names it."""
        folder = f"{kind}/{short(id)}"
        label = self._labels.get(folder)
        if label is None:
            return folder
        return label if kind in ("tokenizer", "corpus", "packing", "tasks") else label.partition(" ")[2]

    def _recorded_labels(self) -> dict[str, str]:
        found = {}
        for study in names.studies(self.store):
            for stage in files.read_json(self.store.study(study) / "variants.json")["stages"]:
                found[stage["folder"]] = stage["label"]
        return found


def show(answer: Answer, *, as_json: bool) -> None:
    """Print an answer; JSON is one object and nothing else."""
    if as_json:
        print(json.dumps(answer.to_json()))
        return
    console = Console(highlight=False, markup=False)
    a, b = answer.a, answer.b
    for letter, side in (("A", a), ("B", b)):
        if side is not None:
            console.print(f"{letter}  {side}  {side.said}, {'in the store' if side.finished else 'not in the store'}")
    if b is None:
        console.print(f"The store has no other finished {a.kind} to compare with.")
        return
    if a.id == b.id:
        same = a.tokens == b.tokens
        console.print("They are the same stage." if same else "They are states of the same trajectory: no key differs.")
        return
    if answer.shared_tokens:
        console.print(f"They are the same up to {answer.shared_tokens:,} tokens.")
    table = Table(box=None, pad_edge=False)
    for column in ("in", "key", "A", "B"):
        table.add_column(column, overflow="fold")
    for stages, one in answer.differences:
        table.add_row(*(Text(text) for text in (", ".join(stages), one.leaf, say(one.a), say(one.b))))
    console.print(table)
