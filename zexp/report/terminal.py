"""The comparison in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zexp.config.tokens import say_tokens
from zexp.report import numbers
from zexp.report.model import Report

STYLE = {"done": "", "missing": "dim", "skipped": "yellow", "diverged": "magenta", "failed": "red"}


def print_tables(report: Report, console: Console) -> None:
    """The leaderboard, the verdicts on the study's metric, what is not done, and what to keep in mind."""
    if report.question:
        console.print(f"[italic]{escape(report.question)}[/italic]")
    console.print(leaderboard(report))
    verdicts = [pair for pair in report.pairs if pair.metric == report.metric] or report.pairs
    for pair in verdicts:
        effect = f"{numbers.difference(pair)} {numbers.interval(pair)}, p (Holm) {numbers.p_value(pair.p_holm)}"
        reason = f" ({pair.reason})" if pair.reason else ""
        text = f"{pair.row} against {pair.baseline}, {pair.metric}: {pair.verdict}; {effect}{reason}"
        console.print(escape(text), highlight=False)
    for one in report.unfinished:
        log = f"\n  log: {report.store}/{one.log}" if one.log else ""
        text = f"{one.variant} {one.status}: {one.reason}{log}"
        console.print(f"[{STYLE[one.status] or 'default'}]{escape(text)}[/]", highlight=False)
    for warning in report.warnings:
        console.print(f"[yellow]Note:[/yellow] {escape(warning)}", highlight=False)


def leaderboard(report: Report) -> Table:
    """A row a variant without its seed, best first on the study's metric."""
    table = Table(title=report.study, title_justify="left", caption_justify="left")
    table.caption = "± 95 %: over seeds; with one seed over its items. ↓ lower is better, ↑ higher."
    table.add_column("variant", overflow="fold")
    table.add_column("status")
    table.add_column("n", justify="right")
    table.add_column("params", justify="right")
    table.add_column("tokens", justify="right")
    for name in report.metric_names:
        table.add_column(name.replace("/", "/\n") + " " + report.arrow(name), justify="right")
    for row in report.ranked():
        cells = [numbers.cell(row.metrics[m]) if m in row.metrics else "–" for m in report.metric_names]
        table.add_row(
            escape(row.name), row.status, numbers.count(row), numbers.parameters(row), say_tokens(row.tokens), *cells,
            style=STYLE[row.status],
        )  # fmt: skip
    return table
