"""What a person sees while stages run: a line for each, and one for all.

On a terminal the lines move; elsewhere (a file, a CI log) a line is printed when a stage starts or ends, and every
30 s one that says how far everything is.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from zexp.study.launch.base import Event, Outcome, Stage

PLAIN_SECONDS = 30.0
BAR_WIDTH = 24
LABEL_WIDTH = 44


class Named(Protocol):
    """A stage, of a launcher or of a plan."""

    @property
    def id(self) -> str: ...
    @property
    def label(self) -> str: ...


@dataclass
class _Running:
    """A stage on a slot. done_first and seen: where it was at the first look, for its speed from then on."""

    stage: Stage
    began: float
    attempt: Path | None = None
    note: str = ""
    figures: dict[str, Any] | None = None
    first: tuple[float, float] | None = None  # (time, done) at the first look

    def look(self, now: float) -> None:
        """Read the attempt's progress.json, if there is one by now."""
        if self.attempt is None:
            return
        try:
            self.figures = json.loads((self.attempt / "progress.json").read_text())
        except FileNotFoundError:
            return  # a stage says something when it has something to say
        if self.first is None:
            self.first = (now, self.figures["done"])

    @property
    def fraction(self) -> float:
        if not self.figures or not self.figures["total"]:
            return 0.0
        return min(1.0, self.figures["done"] / self.figures["total"])

    def speed(self, now: float) -> float | None:
        """Units a second: what the stage says, else what was seen."""
        if not self.figures or self.first is None:
            return None
        said = self.figures.get(f"{self.figures['unit']}_per_second")
        if said:
            return float(said)
        seconds, done = now - self.first[0], self.figures["done"] - self.first[1]
        return done / seconds if seconds > 1 and done > 0 else None

    def columns(self, now: float) -> tuple[str, str, str]:
        """Speed, loss (or what is known instead), time left."""
        if not self.figures:
            return (self.note, "", say_seconds(now - self.began))
        speed = self.speed(now)
        left = (self.figures["total"] - self.figures["done"]) / speed if speed else None
        loss = self.figures.get("loss")
        return (
            f"{say_count(speed)} {self.figures['unit']}/s" if speed else "",
            f"loss {loss:.3f}" if isinstance(loss, (int, float)) else "",
            f"{say_seconds(left)} left" if left is not None else say_seconds(now - self.began),
        )


class Progress:
    """A context manager, to be given to launch() as on_event. It prints; it decides nothing."""

    def __init__(self, stages: Sequence[Stage], console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._stages = list(stages)
        self._running: dict[str, _Running] = {}
        self._ended: dict[str, Outcome] = {}
        self._began = self._said = time.monotonic()
        self._queue = ""  # what waits where others decide (a cluster)
        self._live = (
            Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        if event.kind == "tick":
            self._queue = event.text
            self._tick(now)
        elif event.kind in ("slot", "stopping"):
            self._print(escape(event.text))
        elif event.stage is not None:
            self._stage(event, event.stage, now)

    def _stage(self, event: Event, stage: Stage, now: float) -> None:
        name = escape(stage.label or stage.id)
        if event.kind == "waiting":
            self._running[stage.id] = _Running(stage, now, note=event.text)
            self._print(f"{name} {escape(event.text)}")
        elif event.kind == "started":
            self._running[stage.id] = _Running(stage, now, event.attempt)
            if self._live is None:
                self._print(f"{name} started")
        elif event.kind == "retry" and event.outcome is not None:
            self._running.pop(stage.id, None)
            self._print(f"{name} failed and is tried again: {escape(_last_line(event.outcome.error))}")
        elif event.kind == "finished" and event.outcome is not None:
            self._running.pop(stage.id, None)
            self._ended[stage.id] = event.outcome
            if event.outcome.status != "skipped":  # told with what made it so, at the end
                self._print(self._end_line(name, event.outcome))

    def _end_line(self, name: str, outcome: Outcome) -> str:
        style = {"done": "green", "interrupted": "yellow"}.get(outcome.status, "red")
        text = f"[{style}]{outcome.status}[/] {name}, {say_seconds(outcome.seconds)}"
        return text if outcome.status == "done" else f"{text}: {escape(_last_line(outcome.error))}"

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def _tick(self, now: float) -> None:
        if self._live is None and now - self._said < PLAIN_SECONDS:
            return
        self._said = now
        for one in self._running.values():
            one.look(now)
        if self._live is not None:
            self._live.update(self._table(now), refresh=True)
        elif self._running or self._queue:
            parts = [
                " ".join(filter(None, (one.stage.label or one.stage.id, f"{one.fraction:.0%}", *one.columns(now))))
                for one in self._running.values()
            ]
            self._print(escape(" · ".join([self._overall(now), *parts])))

    def _table(self, now: float) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(max_width=LABEL_WIDTH, no_wrap=True, overflow="ellipsis")
        table.add_column(width=BAR_WIDTH)
        for _ in range(3):
            table.add_column(justify="right", no_wrap=True)
        for one in self._running.values():
            bar = ProgressBar(100, 100 * one.fraction, width=BAR_WIDTH, pulse=one.figures is None)
            table.add_row(escape(one.stage.label or one.stage.id), bar, *map(escape, one.columns(now)))
        bar = ProgressBar(100, 100 * self._fraction(), width=BAR_WIDTH)
        table.add_row(f"[bold]{self._overall(now)}[/]", bar, "", "", say_seconds(now - self._began))
        return table

    def _overall(self, now: float) -> str:
        text = f"{len(self._ended)} of {len(self._stages)} stages" + (f", {self._queue}" if self._queue else "")
        fraction, seconds = self._fraction(), now - self._began
        if 0.05 < fraction < 1 and seconds > 10:
            text += f", about {say_seconds(seconds * (1 - fraction) / fraction)} left"
        return text

    def _fraction(self) -> float:
        """The done share of the estimated work; of the number of stages where nothing is estimated."""
        weights = {stage.id: stage.cost for stage in self._stages}
        if not sum(weights.values()):
            weights = dict.fromkeys(weights, 1.0)
        done = sum(weights[id] for id in self._ended)
        done += sum(weights[id] * one.fraction for id, one in self._running.items())
        return done / sum(weights.values())


def failures(stages: Sequence[Named], outcomes: Mapping[str, Outcome], console: Console) -> None:
    """Print what did not become done: the end of each failed stage's traceback, its log, and how many it skipped."""
    labels = {stage.id: stage.label or stage.id for stage in stages}
    of = {
        status: [(id, outcome) for id, outcome in outcomes.items() if outcome.status == status]
        for status in ("failed", "diverged", "interrupted", "skipped")
    }
    for id, outcome in of["failed"]:
        tries = f" (tried {outcome.tries} times)" if outcome.tries > 1 else ""
        console.print(f"[red]failed[/] {escape(labels[id])} ({id}){tries}", soft_wrap=True)
        console.print(escape(_indented(outcome.error or "no reason is known")), soft_wrap=True)
        if outcome.log is not None:
            console.print(f"  log: {escape(str(outcome.log))}", soft_wrap=True)
    for id, outcome in of["diverged"]:
        console.print(f"[red]diverged[/] {escape(labels[id])} ({id}): {escape(outcome.error or '')}", soft_wrap=True)
    reasons: dict[str, list[str]] = {}
    for id, outcome in of["interrupted"]:
        reasons.setdefault(outcome.error or "", []).append(labels[id])
    for reason, names in reasons.items():
        which = names[0] if len(names) == 1 else f"{len(names)} of {len(outcomes)} stages are not done"
        console.print(f"[yellow]interrupted[/]: {escape(which)}" + (f": {escape(reason)}" if reason else ""), soft_wrap=True)
    # Not those that need one of the failed ones: the study was stopped.
    stopped = Counter(outcome.error for _, outcome in of["skipped"] if "max_failures" in (outcome.error or ""))
    for why, count in stopped.items():
        console.print(f"skipped {count} stage{'s' * (count != 1)}: {escape(why or '')}", soft_wrap=True)
    if rest := len(of["skipped"]) - sum(stopped.values()):
        console.print(f"skipped {rest} {'stages that need' if rest > 1 else 'stage that needs'} one of those above")


def say_seconds(seconds: float) -> str:
    """4.2 s, 1:05, 2:00:07."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say_count(number: float) -> str:
    """950, 12.3 k, 4.5 M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {letter}"
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}"


def _last_line(text: str | None) -> str:
    """What a traceback says in the end, though the exception's own text may have more lines."""
    lines = (text or "").strip().splitlines()
    said = [line for line in lines if re.match(r"[A-Za-z_][\w.]*: ", line)]
    return (said or lines or [""])[-1].strip()


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
