"""The texts around the numbers: jinja2 templates, the page's style sheet and script, and d3."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from zexp.config.tokens import say_tokens

HERE = Path(__file__).parent


def environment(kind: str) -> Environment:
    """kind: markdown, latex or html; it decides how text is escaped where a template prints it.

    A variable that a template names and nobody gives is an error, never an empty place.
    """
    escape: dict[str, Callable[[object], object]] = {"markdown": _markdown, "latex": _latex}
    made = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=kind == "html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["tokens"] = say_tokens
    if kind in escape:
        made.finalize = escape[kind]
    return made


def text_of(name: str) -> str:
    """A file of this folder that goes into the page as it is."""
    return (HERE / name).read_text(encoding="utf-8")


def d3() -> str:
    """The source of d3 (version 5, BSD), which the wheel of mpld3 carries; nothing is imported or fetched.

    It draws the page's curves. Raises RuntimeError if the installed mpld3 has it elsewhere.
    """
    spec = find_spec("mpld3")  # of a top-level package: finds it without importing it, and so matplotlib
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / "js" / "d3.v5.min.js"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise RuntimeError("d3 is missing: the leaderboard page needs js/d3.v5.min.js of mpld3 (pip install mpld3).")


def _markdown(value: object) -> object:
    return value.replace("|", "\\|") if isinstance(value, str) else value


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "↓": r"$\downarrow$", "↑": r"$\uparrow$",
    "–": "--",
}  # fmt: skip


def _latex(value: object) -> object:
    return "".join(_LATEX.get(char, char) for char in value) if isinstance(value, str) else value
