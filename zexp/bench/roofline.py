"""The roofline of `zexp bench blocks`: FLOPs a byte against FLOP/s, under what the machine can do. No torch.

FILE.html is one file with d3 in it, as the report's page is: it opens without a network and says each point's figures.
FILE.svg is drawn by matplotlib, for a document. Source of the picture: Williams et al. 2009 (doi:10.1145/1498765.1498785).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from zexp.bench.tables import machine_line
from zexp.report.templates import d3
from zexp.report.templates import text_of as style_of
from zexp.store.files import write_atomic

HERE = Path(__file__).parent / "templates"
COLOURS = (
    "#3b82c4", "#e07b39", "#2e9e6b", "#c65b9c", "#b59a1c", "#4fb3bf", "#8a6fd1", "#a0522d", "#7f8c3a", "#d1495b", "#30638e",
    "#66717e", "#c08497", "#5c8001",
)  # fmt: skip
PASSES = ("forward", "backward")
MARKERS = {"forward": "o", "backward": "s"}
TITLE = "Roofline of zexp's blocks"


def write(answer: Mapping[str, Any], path: Path) -> None:
    """Draw what `zexp bench blocks --json` prints. path: ends in .html or .svg; a file that is there is replaced."""
    if path.suffix == ".html":
        write_atomic(path, page(answer))
    else:
        write_atomic(path, svg(answer))


def page(answer: Mapping[str, Any]) -> str:
    """The page's text; colour is the block, a disc the forward and a square the backward pass, hollow fp32 and full bf16."""
    made = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    data = {"points": points(answer), "ceilings": answer["ceilings"], "colours": colours(answer)}
    return made.get_template("roofline.html.j2").render(
        title=TITLE, machine=machine_line(answer["machine"], answer["ceilings"]), date=answer["machine"]["date"], data=data,
        style=Markup(style_of("page.css")), d3=Markup(d3()), script=Markup((HERE / "roofline.js").read_text(encoding="utf-8")),
    )  # fmt: skip


def svg(answer: Mapping[str, Any]) -> str:
    """The same as a picture; lines with a slope are bytes/s, level ones products of matrices."""
    from io import StringIO

    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    found, colour = points(answer), colours(answer)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    low, high = extent(found, answer["ceilings"])
    for precision, dash in (("fp32", ":"), ("bf16", "-")):
        xs, ys = roof(answer["ceilings"], precision, low, high)
        axes.plot(xs, ys, color="0.4", linestyle=dash, linewidth=1.3, label=f"ceiling, {precision}")
    for point in found:
        full = colour[point["block"]] if point["dtype"] == "bf16" else "none"
        edge = colour[point["block"]]
        at = (point["intensity"], point["flops_per_second"])
        axes.plot(*at, MARKERS[point["pass"]], markersize=6, markeredgecolor=edge, markerfacecolor=full)
    for block, one in colour.items():
        axes.plot([], [], "o", color=one, label=block)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="FLOP/s", title=TITLE)
    axes.text(
        0.0,
        -0.16,
        "disc: forward, square: backward; hollow: fp32, full: bf16",
        transform=axes.transAxes,
        fontsize=8,
        color="0.35",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    out = StringIO()
    FigureCanvasSVG(figure).print_svg(
        out, metadata={"Description": machine_line(answer["machine"], answer["ceilings"]), "Date": None}
    )
    return out.getvalue()


def points(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A point a pass of each row: block, dtype, pass, intensity, flops_per_second, and what to say of it."""
    found = []
    for row in answer["rows"]:
        size = f"width {row['width']}, {row['batch']} × {row['seq_len']}, {row['dtype']}, kernels {row['kernels']}"
        size += "".join(f", {key}={value}" for key, value in row["axis_keys"].items())
        for name in PASSES:
            one = row[name]
            found.append(
                {
                    "block": row["block"], "dtype": row["dtype"], "pass": name, "text": size, "intensity": one["intensity"],
                    "flops_per_second": one["flops_per_second"], "seconds": one["median_seconds"],
                    "share": one["share_of_attainable"],
                }
            )  # fmt: skip
    return found


def colours(answer: Mapping[str, Any]) -> dict[str, str]:
    """Block -> its colour, in the order of the rows."""
    names = dict.fromkeys(row["block"] for row in answer["rows"])
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}


def extent(found: list[dict[str, Any]], ceilings: Mapping[str, float]) -> tuple[float, float]:
    """Least and greatest FLOPs a byte to show: the points, and where the roof bends."""
    bends = [ceilings[f"matmul_{precision}"] / ceilings["memory"] for precision in ("fp32", "bf16")]
    shown = [point["intensity"] for point in found] + bends
    return min(shown) / 2, max(shown) * 2


def roof(ceilings: Mapping[str, float], precision: str, low: float, high: float) -> tuple[list[float], list[float]]:
    """The corners of a ceiling between two intensities."""
    matmul, memory = ceilings[f"matmul_{precision}"], ceilings["memory"]
    xs = [low, min(max(matmul / memory, low), high), high]
    return xs, [min(matmul, x * memory) for x in xs]
