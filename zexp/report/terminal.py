"""The comparison in the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zexp.config.tokens import say_tokens
from zexp.report import numbers
from zexp.report.model import Report, Row

STYLE = {"done": "", "missing": "dim", "skipped": "yellow", "diverged": "magenta", "failed": "red"}

TRIVIAL = "without a model"
CAPTION = (
    "± 95 %: over seeds; with one seed over its items. ↓ lower is better, ↑ higher. "
    "Without a model: a unigram model's bits, the most frequent answer, else chance."
)


def print_tables(report: Report, console: Console) -> None:
    """The leaderboard, the verdicts on the study's metric, what is not done, and what to keep in mind."""
    if report.question:
        console.print(f"[italic]{escape(report.question)}[/italic]")
    for table in leaderboard(report, console.width):
        console.print(table)
    console.print(CAPTION, style="dim")
    _print_verdicts(report, console)
    for one in report.unfinished:
        log = f"\n  log: {report.store}/{one.log}" if one.log else ""
        text = f"{one.variant} {one.status}: {one.reason}{log}"
        console.print(f"[{STYLE[one.status] or 'default'}]{escape(text)}[/]", highlight=False)
    for warning in report.warnings:
        console.print(f"[yellow]Note:[/yellow] {escape(warning)}", highlight=False)


def _print_verdicts(report: Report, console: Console) -> None:
    """Each row against its baseline on the study's metric (all metrics where it has none)."""
    verdicts = [pair for pair in report.pairs if pair.metric == report.metric] or report.pairs
    for metric in dict.fromkeys(pair.metric for pair in verdicts):
        tested = sum(pair.p is not None for pair in report.pairs)
        console.print(
            f"\n{escape(metric)} against the baseline (the verdict is by p after Holm's correction for all comparisons of the "
            f"study, {tested} in number; intervals are not adjusted):"
        )
        of_metric = [pair for pair in verdicts if pair.metric == metric]
        for pair in of_metric:
            effect = f"{numbers.difference(pair)} {numbers.interval(pair)}, p (Holm) {numbers.p_value(pair.p_holm)}"
            text = f"  {pair.row} against {pair.baseline}: {pair.verdict}; {effect}"
            console.print(escape(text), highlight=False, soft_wrap=True)
        for reason in dict.fromkeys(pair.reason for pair in of_metric if pair.reason):
            which = [pair.row for pair in of_metric if pair.reason == reason]
            console.print(escape(f"  ({'' if len(which) == len(of_metric) else ', '.join(which) + ': '}{reason})"), style="dim")


def leaderboard(report: Report, width: int) -> list[Table]:
    """A row a variant without its seed, best first on the study's metric, and what needs no model; nothing is cut off:
    the metrics that do not fit into `width` columns beside each other stand in tables below.
    """
    rows = report.ranked()
    fixed = [
        ("variant", "left", [row.name for row in rows] + [TRIVIAL]),
        ("n", "right", [numbers.count(row) for row in rows] + [""]),
        ("params", "right", [numbers.parameters(row) for row in rows] + [""]),
        ("tokens", "right", [say_tokens(row.tokens) for row in rows] + [""]),
    ]
    if any(row.status != "done" for row in rows):
        fixed.insert(1, ("status", "left", [row.status for row in rows] + [""]))
    scored = [(_heading(report, name), "right", _scores(rows, name)) for name in report.metric_names]
    tables = []
    for number, (columns, metrics) in enumerate(_fitting(fixed, scored, width)):
        table = Table(title=report.study if number == 0 else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading, justify, _ in columns + metrics:
            table.add_column(heading, justify=justify, overflow="fold")
        for n, cells in enumerate(zip(*(texts for _, _, texts in columns + metrics), strict=True)):
            table.add_row(*map(escape, cells), style=STYLE[rows[n].status] if n < len(rows) else "dim")
        tables.append(table)
    return tables


Column = tuple[str, Any, list[str]]  # heading, justification, cells


def _heading(report: Report, metric: str) -> str:
    task, _, name = metric.rpartition("/")
    return f"{task}/\n{name} {report.arrow(metric)}" if task else f"{name} {report.arrow(metric)}"


def _scores(rows: list[Row], metric: str) -> list[str]:
    cells = [row.metrics.get(metric) for row in rows]
    known = next((cell for cell in cells if cell is not None), None)
    trivial = None if known is None else known.reference["value"] if known.reference else known.chance
    texts = [
        numbers.short_cell(cell) + numbers.fewer_seeds(row, cell) if cell is not None else "–"
        for row, cell in zip(rows, cells, strict=True)
    ]
    return [*texts, "" if trivial is None else f"{trivial:.3f}"]


def _fitting(fixed: list[Column], scored: list[Column], width: int) -> list[tuple[list[Column], list[Column]]]:
    """The scored columns in as few tables as fit; the second and later ones repeat the variant alone."""
    tables: list[tuple[list[Column], list[Column]]] = [(fixed, [])]
    for column in scored:
        columns, metrics = tables[-1]
        if metrics and sum(map(_width, [*columns, *metrics, column])) > width:
            tables.append((fixed[:1], []))
        tables[-1][1].append(column)
    return tables


def _width(column: Column) -> int:
    heading, _, cells = column
    return max(map(len, [*heading.split("\n"), *cells])) + 3  # with the padding and the gap between columns
