"""The comparison as a terminal shows it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from zexp.report import build, terminal
from zexp.report.model import Report
from zexp.store.folder import Store


@pytest.fixture
def made(finished: Store) -> Report:
    return build(finished.root, "invented")


def shown(report: Report, width: int) -> str:
    out = io.StringIO()
    terminal.print_tables(report, Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_every_row_and_score_is_whole_at_any_width(made: Report, width: int) -> None:
    text = shown(made, width)
    assert "…" not in text
    lines = text.splitlines()
    for row in made.rows:
        assert any(line.split()[:1] == [row.name] for line in lines), row.name
    for metric in made.metric_names:
        assert all(part in text for part in metric.split("/"))
    heads = [line for line in lines if line.split()[:1] == ["variant"]]
    assert len(heads) == 1 or width < 200


def test_what_needs_no_model_is_a_row(made: Report) -> None:
    assert any(line.lstrip().startswith("without a model") for line in shown(made, 120).splitlines())


def test_a_caution_that_all_share_is_said_once(made: Report) -> None:
    text = " ".join(shown(made, 200).split())
    for reason in {pair.reason for pair in made.pairs if pair.metric == made.metric and pair.reason}:
        assert text.count(" ".join(reason.split())) == 1
