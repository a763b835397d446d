"""Small trees of stages whose handlers are fakes, in a store of their own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.study.launch import handlers
from zexp.store.folder import Store
from zexp.store.ids import semantic_id
from zexp.study.launch import Event, LocalOptions, Outcome, Stage, launch

HANDLERS = dict.fromkeys(("corpus", "segment", "eval"), "tests.study.launch.handlers:run")


class Tree:
    """Stages named by a letter or two."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        self.store.root.mkdir(parents=True, exist_ok=True)
        self.stages: list[Stage] = []
        self.events: list[Event] = []

    def add(
        self, id: str, *parents: str, kind: str = "corpus", cost: float = 0.0, created: bool = True, **request: Any
    ) -> Stage:
        folder_kind = "trajectory" if kind == "segment" else kind
        semantic = {"fake": id}
        folder = self.store.folder(folder_kind, semantic_id(semantic))
        if created:
            folder.create(semantic, {})
        if kind == "segment":
            request.setdefault("to", 100)
        stage = Stage(
            id=id,
            kind=kind,
            folder=f"{folder_kind}/{folder.path.name}",
            parents=parents,
            request={"device": "cpu", "threads": 1, **request},
            label=f"stage {id}",
            cost=cost,
        )
        self.stages.append(stage)
        return stage

    def launch(self, *, slots: int = 1, **options: Any) -> dict[str, Outcome]:
        chosen = {"slots": slots, "preload": (), "handlers": HANDLERS, "grace_seconds": 5.0} | options
        on_event = chosen.pop("on_event", self.events.append)
        return launch(self.stages, self.store, LocalOptions(**chosen), on_event)

    def record(self, *whats: str) -> list[dict[str, Any]]:
        return [line for line in handlers.read(self.store.root) if not whats or line["what"] in whats]

    def started(self) -> list[str]:
        return [line["stage"] for line in self.record("start")]


def statuses(outcomes: dict[str, Outcome]) -> dict[str, str]:
    return {id: outcome.status for id, outcome in outcomes.items()}


def with_status(outcomes: dict[str, Outcome], status: str) -> Iterable[str]:
    return [id for id, outcome in outcomes.items() if outcome.status == status]
