"""leaderboard.html: one file with everything in it, which opens from a disk without a network."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from zexp.report import numbers
from zexp.report.model import Cell, Pair, Report, Row
from zexp.report.statistics import ALPHA
from zexp.report.templates import d3, environment, text_of
from zexp.report.tree import Trajectory, draw
from zexp.report.verdicts import BETTER, WORSE

BAR_WIDTH = 96  # px: a cell's interval, drawn on its column's scale


@dataclass
class Bar:
    """Positions in px of a cell's interval and mean on the scale of its column."""

    low: float
    high: float
    mean: float


def page(report: Report, folder: Path) -> str:
    """The page's text. folder: where it will lie; links to stages are relative to it."""
    links = {stage.id: _link(report, stage.folder, folder) for stage in report.stages}
    verdicts = {(pair.row, pair.metric): pair for pair in report.pairs}
    counts = Counter(row.status for row in report.rows)
    return (
        environment("html")
        .get_template("leaderboard.html.j2")
        .render(
            report=report,
            numbers=numbers,
            rows=report.ranked(),
            bars=_bars(report),
            verdicts=verdicts,
            levels=_levels(report),
            counts=counts,
            drawing=draw(report.trajectories),
            by_id={trajectory.id: trajectory for trajectory in report.trajectories},
            stages={stage.id: stage for stage in report.stages},
            links=links,
            log_link=lambda log: _link(report, log, folder),
            curves=_curves(report),
            has_loss=any(curve.loss for curve in report.curves),
            averaged=max((curve.averaged for curve in report.curves), default=1),
            primary=_on_metric(report.pairs, report.metric),
            secondary=[pair for pair in report.pairs if pair.metric != report.metric],
            tested=sum(pair.p is not None for pair in report.pairs),
            alpha=f"{ALPHA:.2f}",
            better=BETTER,
            worse=WORSE,
            label_of=_label,
            bar_width=BAR_WIDTH,
            d3=Markup(d3()),
            style=Markup(text_of("page.css")),
            script=Markup(text_of("page.js")),
        )
    )


def _on_metric(pairs: Sequence[Pair], metric: str | None) -> list[Pair]:
    return [pair for pair in pairs if pair.metric == metric]


def _link(report: Report, path: str, folder: Path) -> str:
    return Path(os.path.relpath(Path(report.store) / path, folder)).as_posix()


def _bars(report: Report) -> dict[tuple[str, str], Bar]:
    bars: dict[tuple[str, str], Bar] = {}
    for metric in report.metric_names:
        cells = {row.name: row.metrics[metric] for row in report.rows if metric in row.metrics}
        low = min(_ends(cell)[0] for cell in cells.values())
        high = max(_ends(cell)[1] for cell in cells.values())
        scale = (BAR_WIDTH - 8) / ((high - low) or 1.0)
        for name, cell in cells.items():
            ends = [round(4 + (value - low) * scale, 1) for value in (*_ends(cell), cell.mean)]
            bars[name, metric] = Bar(*ends)
    return bars


def _ends(cell: Cell) -> tuple[float, float]:
    return (cell.mean, cell.mean) if cell.low is None or cell.high is None else (cell.low, cell.high)


def _levels(report: Report) -> list[dict[str, Any]]:
    """Rows below the table: what guessing and a trivial model score, by metric, where the results say."""
    levels: dict[str, dict[str, float]] = {}
    for row in report.rows:
        for metric, cell in row.metrics.items():
            if cell.chance is not None:
                levels.setdefault("chance", {})[metric] = cell.chance
            if cell.reference is not None:
                levels.setdefault(cell.reference["name"], {})[metric] = cell.reference["value"]
    return [{"name": name, "values": values} for name, values in levels.items()]


def _label(trajectory: Trajectory) -> str:
    users = trajectory.users
    return ", ".join(users[:2]) + (f" and {len(users) - 2} more" if len(users) > 2 else "")


def _curves(report: Report) -> dict[str, Any]:
    """What the script draws: a series a trajectory, with the axes' values on which its rows agree."""
    rows: dict[str, Row] = {row.name: row for row in report.rows}
    axes = [axis for axis in dict.fromkeys(a for row in report.rows for a in row.axes) if _varies(report.rows, axis)]
    if any(len(row.seeds) > 1 for row in report.rows):
        axes.append("seed")
    trajectories = {trajectory.id: trajectory for trajectory in report.trajectories}
    series = []
    for curve in report.curves:
        trajectory = trajectories[curve.trajectory]
        users = [rows[name] for name in trajectory.rows]
        values: dict[str, str | None] = {}
        for axis in axes:
            found = _seeds(trajectory, users) if axis == "seed" else {str(row.axes.get(axis)) for row in users}
            values[axis] = found.pop() if len(found) == 1 else None
        series.append(
            {
                "id": curve.trajectory,
                "label": trajectory.label,
                "variants": _label(trajectory),
                "parent": trajectory.parent,
                "start": trajectory.start,
                "axes": values,
                "loss": curve.loss,
                "lr": curve.lr,
            }
        )
    return {"axes": axes, "series": series}


def _varies(rows: Sequence[Row], axis: str) -> bool:
    return len({str(row.axes[axis]) for row in rows if axis in row.axes}) > 1


def _seeds(trajectory: Trajectory, users: Sequence[Row]) -> set[str]:
    stages = {mark.stage for mark in trajectory.marks}
    return {seed for row in users for seed, chain in row.segments.items() if stages & set(chain)}
