"""What every launcher is given and what it answers.

A launcher knows stages as data: folders of the store, a request of execution keys for each, and who waits for whom.
It starts them, watches them and says how each ended; what a stage computes is the handler's business
(`zexp.study.stages`), whether it is done is the store's.
"""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zexp.config.errors import ConfigError
from zexp.store.folder import Store

Status = Literal["done", "failed", "diverged", "interrupted", "skipped"]
Happening = Literal["started", "waiting", "retry", "finished", "slot", "stopping", "tick"]


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

    started, waiting (another process holds the stage's lease), retry and finished name a stage; started and finished
    its attempt's folder; finished its outcome. slot and stopping carry a sentence. tick comes twice a second.
    """

    kind: Happening
    stage: Stage | None = None
    attempt: Path | None = None
    outcome: Outcome | None = None
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class LauncherOptions:
    """How stages are run. Nothing here changes a result."""

    backend: str = "local"
    slots: int | None = None  # at most so many at once; None = as many as the machine has
    grace_seconds: float = 30.0  # after an interruption: how long stages may take to write a state
    retries: int = 0  # how often a failed stage is started again; each reason stays in its attempt's folder
    start_method: str = "spawn" if platform.system() == "Darwin" else "fork"
    preload: tuple[str, ...] = ("torch", "zexp.train.loop")  # imported once by each slot (fork only)
    handlers: dict[str, str] = field(default_factory=dict)  # kind -> "module:function", instead of the table's

    def check(self) -> None:
        """Raise ConfigError with everything that is wrong."""
        where = "hydra.launcher"
        problems = []
        if self.backend != "local":
            problems.append(f"{where}.backend = {self.backend!r}: there is no such launcher. There is: local.")
        if self.slots is not None and (not _whole(self.slots) or self.slots < 1):
            problems.append(f"{where}.slots = {self.slots!r}: give a number from 1 on, or null for the whole machine.")
        if not _number(self.grace_seconds) or self.grace_seconds < 0:
            problems.append(f"{where}.grace_seconds = {self.grace_seconds!r}: give seconds from 0 on.")
        if not _whole(self.retries) or self.retries < 0:
            problems.append(f"{where}.retries = {self.retries!r}: give a number from 0 on.")
        if self.start_method not in ("fork", "spawn"):
            problems.append(f"{where}.start_method = {self.start_method!r}: give fork or spawn.")
        if problems:
            raise ConfigError(problems)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return _whole(value) or isinstance(value, float)


OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The display of whoever wants none."""


def launch(
    stages: Sequence[Stage], store: Store, options: LauncherOptions, on_event: OnEvent = ignore
) -> dict[str, Outcome]:
    """Run the stages, parents first, and answer how each ended, by stage id.

    stages: topologically sorted, none of them in the store, their folders created. Returns when all have ended or were
    given up: a stage that did not become `done` skips its descendants and nothing else. After Ctrl-C or SIGTERM running
    stages write a state, and everything unfinished is `interrupted`. Called twice with the same stages it trains nothing
    twice: the store decides. Raises ConfigError for options that cannot be met, before anything starts.
    """
    options.check()
    if not stages:
        return {}
    from zexp.study.launch.local import LocalLaunch

    return LocalLaunch(stages, store, options, on_event).run()
