"""A report as files: leaderboard.{html,json,md,csv,tex} in the study's folder, each whole or not at all."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from zexp.report import numbers
from zexp.report.model import Report
from zexp.report.page import page
from zexp.report.templates import environment
from zexp.store.files import write_atomic
from zexp.store.folder import Store


def write(report: Report, folder: Path | None = None) -> dict[str, Path]:
    """Write all five and return them by suffix. folder: default store/studies/<name>/report."""
    target = folder if folder is not None else Store(Path(report.store)).study(report.study) / "report"
    target.mkdir(parents=True, exist_ok=True)
    texts = {
        "json": as_json(report),
        "csv": as_csv(report),
        "md": as_markdown(report),
        "tex": as_latex(report),
        "html": page(report, target),
    }
    paths = {suffix: target / f"leaderboard.{suffix}" for suffix in texts}
    for suffix, text in texts.items():
        write_atomic(paths[suffix], text)
    return paths


def as_json(report: Report) -> str:
    return json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def as_csv(report: Report) -> str:
    """A line a row; of each metric mean, low, high, n and what the interval is over."""
    axes = list(dict.fromkeys(axis for row in report.rows for axis in row.axes if axis not in ("arch", "anneal")))
    fixed = ["variant", *axes, "arch", "anneal", "status", "seeds", "parameters", "tokens", "train_flops"]
    parts = ["mean", "low", "high", "n", "interval"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(fixed + [f"{metric} {part}" for metric in report.metric_names for part in parts])
    for row in report.ranked():
        line: list[Any] = [
            row.name, *(row.axes.get(axis) for axis in axes), row.arch, row.anneal, row.status, " ".join(map(str, row.seeds)),
            row.parameters["total"], row.tokens, row.train_flops,
        ]  # fmt: skip
        for metric in report.metric_names:
            cell = row.metrics.get(metric)
            line += [getattr(cell, part) for part in parts] if cell is not None else [None] * len(parts)
        writer.writerow(line)
    return out.getvalue()


def as_markdown(report: Report) -> str:
    return environment("markdown").get_template("leaderboard.md.j2").render(report=report, numbers=numbers)


def as_latex(report: Report) -> str:
    """A booktabs table in a table environment: \\input it; needs \\usepackage{booktabs}."""
    return environment("latex").get_template("leaderboard.tex.j2").render(report=report, numbers=numbers)
