"""A store as one look found it, less what somebody thinks of deleting: plans are made on it as on the store itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zexp.store.folder import OPTIMIZER, StageFolder, Store
from zexp.store.ids import short
from zexp.store.inventory import Inventory, Seen


@dataclass(frozen=True)
class Snapshot(Store):
    """Answers what Store answers of results and states, from an Inventory. Its folders are for looking only."""

    seen: Mapping[str, Seen] = field(default_factory=dict)

    @classmethod
    def of(cls, inventory: Inventory) -> Snapshot:
        store = inventory.store
        return cls(store.root, store.lease_times, store.patience, inventory.stages)

    def folder(self, kind: str, id: str) -> StageFolder:
        name = short(id)
        seen = self.seen.get(f"{kind}/{name}")
        # What came after the look is not there, so that an answer does not depend on when it is asked for.
        root = self.root if seen is not None else Path(os.devnull)
        return SeenFolder(self, kind, id, root / kind / name, seen)

    def without(self, places: Mapping[str, set[str]]) -> Snapshot:
        """The same without these places of these stages: "states/64", "states/64/optimizer", or "" for all of it."""
        left = {}
        for key, seen in self.seen.items():
            gone = places.get(key, set())
            if "" in gone:
                continue
            states = {
                tokens: replace(state, trainable=state.trainable and f"states/{tokens}/{OPTIMIZER}" not in gone)
                for tokens, state in seen.states.items()
                if f"states/{tokens}" not in gone
            }
            left[key] = replace(seen, states=states)
        return replace(self, seen=left)


@dataclass(frozen=True)
class SeenFolder(StageFolder):
    """A folder of a Snapshot; one that was not there has nothing."""

    seen: Seen | None = None

    def semantic(self) -> dict[str, Any]:
        return super().semantic() if self.seen is None else dict(self.seen.semantic)

    @property
    def result(self) -> Path | None:
        return self.path / "result" if self.seen is not None and self.seen.result else None

    def state(self, tokens: int) -> Path | None:
        state = None if self.seen is None else self.seen.states.get(tokens)
        return None if state is None else state.path

    def trainable(self, tokens: int) -> Path | None:
        state = None if self.seen is None else self.seen.states.get(tokens)
        return state.path if state is not None and state.trainable else None

    def states(self) -> list[int]:
        return [] if self.seen is None else sorted(self.seen.states)

    def diverged(self) -> dict[str, Any] | None:
        return None if self.seen is None else self.seen.diverged
