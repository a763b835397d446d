"""Numbers as the tables write them."""

from __future__ import annotations

from zexp.config.tokens import say_tokens
from zexp.report.model import Cell, Pair, Row


def score(value: float) -> str:
    """Four decimals; four digits from ten on."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


def half(cell: Cell) -> float | None:
    """Half the interval's width: a mean's interval is symmetric."""
    return None if cell.low is None or cell.high is None else (cell.high - cell.low) / 2


def cell(cell: Cell, plus_minus: str = "±") -> str:
    width = half(cell)
    return score(cell.mean) if width is None else f"{score(cell.mean)} {plus_minus} {score(width)}"


def short_cell(cell: Cell) -> str:
    """The same with a digit less, for a terminal."""
    width = half(cell)
    digits = 3 if abs(cell.mean) < 10 else 2
    return f"{cell.mean:.{digits}f}" + ("" if width is None else f" ±{width:.{digits}f}")


def seeds(cell: Cell) -> str:
    """`n=3`; with one seed, whether the interval is over its items."""
    return f"n={cell.n}" + (", items" if cell.interval == "items" else "")


def fewer_seeds(row: Row, cell: Cell) -> str:
    """` n=2` where a cell has not all of its row's seeds."""
    return "" if cell.n == len(row.by_seed) else f" n={cell.n}"


def count(row: Row) -> str:
    """`2/3` seeds done, or how many there are."""
    done = sum(status == "done" for status in row.by_seed.values())
    return str(done) if done == len(row.by_seed) else f"{done}/{len(row.by_seed)}"


def parameters(row: Row) -> str:
    return say_tokens(row.parameters["total"])


def flops(value: float) -> str:
    return f"{value:.3g}"


def p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "<0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def difference(pair: Pair) -> str:
    return "–" if pair.difference is None else f"{pair.difference:+.4f}"


def interval(pair: Pair) -> str:
    return "–" if pair.low is None or pair.high is None else f"[{pair.low:+.4f}, {pair.high:+.4f}]"
