"""Figures of measurements as people read them, and the lines around a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def table(*columns: str, title: str | None = None) -> Table:
    """The first column to the left, the others to the right."""
    made = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(columns):
        made.add_column(name, justify="right" if number else "left", no_wrap=True)
    return made


def show(made: Table, console: Console) -> None:
    """A table as wide as it is: a narrow terminal breaks its lines, and no figure is cut off."""
    whole = Measurement.get(console, console.options.update(max_width=1000), made).maximum
    Console(highlight=False, width=max(whole, console.width)).print(made)


def say_rate(flops_per_second: float) -> str:
    """Of FLOP/s: '1.93 TFLOP/s'."""
    for unit, factor in (("PFLOP/s", 1e15), ("TFLOP/s", 1e12), ("GFLOP/s", 1e9)):
        if flops_per_second >= factor:
            return f"{flops_per_second / factor:.3g} {unit}"
    return f"{flops_per_second / 1e6:.3g} MFLOP/s"


def say_milliseconds(seconds: float) -> str:
    """'12.3 ms'; three digits, whole above 100."""
    value = 1e3 * seconds
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def machine_line(machine: Mapping[str, Any], ceilings: Mapping[str, float]) -> str:
    """What was measured on, with its ceilings."""
    threads = f", {machine['threads']} thread{'s' * (machine['threads'] != 1)}" if machine["kind"] == "cpu" else ""
    return (
        f"{machine['device']}{threads}, torch {machine['torch']}: "
        f"products of matrices {say_rate(ceilings['matmul_fp32'])} in fp32, "
        f"{say_rate(ceilings['matmul_bf16'])} in bf16; memory {ceilings['memory'] / 1e9:.3g} GB/s (all three measured now)."
    )
