"""What every launcher is given and what it answers.

A launcher knows stages as data: folders of the store, a request of execution keys for each, and who waits for whom.
It starts them, watches them and says how each ended; what a stage computes is the handler's business
(`zexp.study.stages`), whether it is done is the store's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from zexp.study import ranks

Status = Literal["done", "failed", "diverged", "interrupted", "skipped", "submitted"]
Happening = Literal["started", "waiting", "retry", "finished", "slot", "stopping", "tick"]


class Size(NamedTuple):
    """What a stage takes of a machine: CPU threads of each of its processes, and how many processes it has."""

    threads: int = 1
    ranks: int = 1


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A node of the plan that is not in the store yet."""

    id: str
    kind: str  # tokenizer | corpus | packing | tasks | segment | eval
    folder: str  # relative to the store: trajectory/<hash16>
    parents: Sequence[str] = ()  # stage ids; a parent that is not launched along with this one is in the store
    request: dict[str, Any] = field(default_factory=dict)  # execution keys, JSON; stage, kind and folder are added
    phase: str | None = None
    label: str = ""  # what a person calls it
    cost: float = 0.0  # estimated seconds on one slot; 0 = unknown

    @property
    def size(self) -> Size:
        return Size(int(self.request.get("threads", 1)), ranks.count(self.request))

    def full_request(self) -> dict[str, Any]:
        """The request as its handler gets it."""
        return {**self.request, "stage": self.id, "kind": self.kind, "folder": self.folder}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a stage ended."""

    status: Status
    error: str | None = None  # why not done: the end of the traceback, or a sentence
    seconds: float = 0.0  # from its (last) start to its end; 0 if it never started
    log: Path | None = None  # of the last attempt
    tries: int = 0


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that a display may want to show.

    started, waiting (another process has the stage in hand), retry and finished name a stage; started and finished
    its attempt's folder; finished its outcome. slot and stopping carry a sentence. tick comes twice a second; its text says what
    waits in a queue.
    """

    kind: Happening
    stage: Stage | None = None
    attempt: Path | None = None
    outcome: Outcome | None = None
    text: str = ""


def stopped_after(failures: int) -> str:
    """Why a stage is skipped that needs no failed one."""
    return f"stopped after {failures} failure{'s' * (failures != 1)} (hydra.launcher.max_failures)"


OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The display of whoever wants none."""
