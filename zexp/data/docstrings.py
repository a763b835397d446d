"""Python source taken apart: its docstrings, each with the signature it belongs to, and what is left without them."""

from __future__ import annotations

import ast
import gc
import inspect
import io
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

NUMERICS = {"data.docstrings": 1}


@dataclass(frozen=True)
class Docstring:
    """One docstring of a file, as a reader sees it."""

    symbol: str  # module | class | function
    name: str  # qualified inside the module: 'Path.open'; '' for the module itself
    signature: str  # the def or class line(s), dedented, without decorators; '' for a module
    text: str  # inspect.cleandoc of the docstring, not empty


@dataclass(frozen=True)
class Taken:
    """A file taken apart."""

    code: str  # valid Python whose syntax tree is the original's without docstrings
    docstrings: list[Docstring]


def decode(data: bytes) -> str:
    """Python source as text, by its encoding line or BOM, with \\n line ends.

    Raises SyntaxError for an unknown encoding, UnicodeDecodeError for bytes that are not in it.
    """
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def take_apart(source: str) -> Taken:
    """Cut the docstrings out of Python source.

    A docstring's whole lines go; where it was a body's only statement, `pass` takes its place.  A string that is empty
    after cleaning is cut and not returned.  Raises SyntaxError (ValueError for null bytes) if it is no Python.
    """
    with _fast_parsing():  # the tree is gone when the cycle collector comes back, so it never walks it
        return _take_apart(source)


def _take_apart(source: str) -> Taken:
    tree = ast.parse(source)
    lines = source.encode().split(b"\n")  # the columns of a syntax tree count UTF-8 bytes
    found: list[Docstring] = []
    cuts: list[tuple[ast.Expr, bool]] = []
    for node, name in _documented(tree, ""):
        first = node.body[0]
        assert isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        assert isinstance(first.value.value, str)
        cuts.append((first, len(node.body) == 1 and not isinstance(node, ast.Module)))
        text = inspect.cleandoc(first.value.value)
        if text:
            found.append(Docstring(_symbol(node), name, _signature(node, lines), text))
    for statement, only in reversed(cuts):  # from the end, so that the places before stay where they are
        _cut(lines, statement, only)
    return Taken(b"\n".join(lines).decode(), found)


def _kinds() -> list[type[ast.AST]]:
    return [*ast.stmt.__subclasses__(), ast.ExceptHandler, ast.match_case, ast.Module]


_Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_PARTS = ("body", "cases", "handlers", "orelse", "finalbody")  # where a statement has statements, in source order
# Only these are looked into: a docstring's scope is never inside an expression.
_PARTS_OF: dict[type[ast.AST], tuple[str, ...]] = {
    kind: tuple(part for part in _PARTS if part in kind._fields) for kind in _kinds()
}


def _documented(node: ast.AST, name: str) -> Iterator[tuple[_Scope, str]]:
    """Every scope with a docstring below `node`, itself included, in source order."""
    if isinstance(node, _Scope) and node.body and _is_string(node.body[0]):
        yield node, name
    for part in _PARTS_OF[type(node)]:
        for child in getattr(node, part):
            if not _PARTS_OF[type(child)]:
                continue
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _documented(child, f"{name}.{child.name}" if name else child.name)
            else:
                yield from _documented(child, name)


def _is_string(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _symbol(node: _Scope) -> str:
    if isinstance(node, ast.Module):
        return "module"
    return "class" if isinstance(node, ast.ClassDef) else "function"


def _signature(node: _Scope, lines: list[bytes]) -> str:
    """The text from def or class up to the docstring: `def f(a, b=1):`, over as many lines as it has."""
    if isinstance(node, ast.Module):
        return ""
    end = node.body[0]
    parts = lines[node.lineno - 1 : end.lineno]
    parts[-1] = parts[-1][: end.col_offset]
    parts[0] = b" " * node.col_offset + parts[0][node.col_offset :]  # `if x: ` may stand before it
    return textwrap.dedent(b"\n".join(parts).decode()).rstrip()


def _cut(lines: list[bytes], statement: ast.Expr, only: bool) -> None:
    assert statement.end_lineno is not None and statement.end_col_offset is not None
    first, last = statement.lineno - 1, statement.end_lineno - 1
    before, after = lines[first][: statement.col_offset], lines[last][statement.end_col_offset :]
    if only:
        lines[first : last + 1] = [before + b"pass" + after]
        return
    after = after.lstrip()
    if after.startswith(b";"):
        after = after[1:].lstrip()
        if not after or after.startswith(b"#"):  # """text"""; and nothing more on the line
            lines[first : last + 1] = [before + after] if after else []
            return
    if not after and not before.strip():
        lines[first : last + 1] = []
    else:
        lines[first : last + 1] = [before + after]


@contextmanager
def _fast_parsing() -> Iterator[None]:
    """Without the cycle collector (a syntax tree has no cycles, and it is walked again and again while one grows:
    2.5 times slower), and without the warnings that are the file's author's business."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if was_enabled:
            gc.enable()
