"""What a person sees."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from zexp.study.launch import progress
from zexp.study.launch.base import Event, Outcome, Stage


def stage(id: str, cost: float = 0.0) -> Stage:
    return Stage(id=id, kind="segment", folder=f"trajectory/{id}", label=f"[{id}] pretrain", cost=cost)


def plain() -> Console:
    return Console(file=io.StringIO(), width=120, highlight=False)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def at(attempt: Path, done: float, **figures: float) -> None:
    attempt.mkdir(exist_ok=True)
    (attempt / "progress.json").write_text(json.dumps({"done": done, "total": 1000, "unit": "tokens", **figures}))


def test_without_a_terminal_a_line_says_when_a_stage_starts_and_ends(tmp_path):
    console = plain()
    one = stage("a")
    with progress.Progress([one], console) as show:
        show(Event(kind="started", stage=one, attempt=tmp_path))
        show(Event(kind="tick"))
        show(Event(kind="finished", stage=one, outcome=Outcome(status="done", seconds=65)))
    assert text(console) == "[a] pretrain started\ndone [a] pretrain, 1:05\n"


def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    console = plain()
    one = stage("a")
    at(tmp_path / "1", 250, tokens_per_second=50, loss=4.125)
    with progress.Progress([one, stage("b")], console) as show:
        show(Event(kind="started", stage=one, attempt=tmp_path / "1"))
        show(Event(kind="tick"))
    assert "0 of 2 stages · [a] pretrain 25% 50 tokens/s loss 4.125 15 s left" in text(console)


def test_on_a_terminal_each_running_stage_has_a_line(tmp_path):
    console = Console(file=io.StringIO(), width=120, force_terminal=True, highlight=False)
    one, two = stage("a"), stage("b")
    at(tmp_path / "1", 250, tokens_per_second=12_300, loss=4.125)
    with progress.Progress([one, two], console) as show:
        show(Event(kind="started", stage=one, attempt=tmp_path / "1"))
        show(Event(kind="started", stage=two, attempt=tmp_path / "none yet"))
        show(Event(kind="tick"))
        shown = text(console)
    for expected in ("[a] pretrain", "12.3 k tokens/s", "loss 4.125", "[b] pretrain", "0 of 2 stages"):
        assert expected in shown


def test_a_failure_is_told_in_one_line_at_once(tmp_path):
    console = plain()
    one = stage("a")
    show = progress.Progress([one], console)
    show(Event(kind="finished", stage=one, outcome=Outcome(status="failed", error="Traceback\nValueError: [no]")))
    assert text(console) == "failed [a] pretrain, 0.0 s: ValueError: [no]\n"


def test_the_end_shows_tracebacks_logs_and_what_was_skipped(tmp_path):
    console = plain()
    outcomes = {
        "a": Outcome(status="failed", error="Traceback\nValueError: no", log=tmp_path / "log", tries=2),
        "b": Outcome(status="skipped", error="a is failed"),
        "c": Outcome(status="diverged", error="diverged after 100 tokens: loss is nan"),
        "d": Outcome(status="done"),
    }
    progress.failures([stage(id) for id in "abcd"], outcomes, console)
    assert text(console) == (
        "failed [a] pretrain (a) (tried 2 times)\n  Traceback\n  ValueError: no\n"
        f"  log: {tmp_path / 'log'}\n"
        "diverged [c] pretrain (c): diverged after 100 tokens: loss is nan\n"
        "skipped 1 stage that needs one of those above\n"
    )


def test_the_end_tells_what_needs_a_failed_stage_from_what_was_stopped(tmp_path):
    console = plain()
    outcomes = {
        "a": Outcome(status="failed", error="no"),
        "b": Outcome(status="skipped", error="stage a is failed"),
        "c": Outcome(status="skipped", error="stopped after 1 failure (hydra.launcher.max_failures)"),
        "d": Outcome(status="skipped", error="stopped after 1 failure (hydra.launcher.max_failures)"),
    }
    progress.failures([stage(id) for id in "abcd"], outcomes, console)
    assert text(console).splitlines()[-2:] == [
        "skipped 2 stages: stopped after 1 failure (hydra.launcher.max_failures)",
        "skipped 1 stage that needs one of those above",
    ]


def test_the_bar_counts_estimated_work_where_it_is_known(tmp_path):
    one, two = stage("a", cost=30), stage("b", cost=10)
    show = progress.Progress([one, two], plain())
    show(Event(kind="finished", stage=one, outcome=Outcome(status="done")))
    assert show._fraction() == 0.75


@pytest.mark.parametrize(("seconds", "said"), [(4.21, "4.2 s"), (42, "42 s"), (125, "2:05"), (7207, "2:00:07")])
def test_times_are_said_as_people_do(seconds, said):
    assert progress.say_seconds(seconds) == said
