"""Cutting docstrings out of source, checked on syntax trees of real files."""

import ast
import hashlib
import sysconfig
import warnings
from pathlib import Path

import pytest

from zexp.data.docstrings import Docstring, decode, take_apart

SCOPES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def without_docstrings(source: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, SCOPES) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
            if not node.body and not isinstance(node, ast.Module):
                node.body.append(ast.Pass())
    return ast.dump(tree)


def stdlib_sample():
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        is_left_out = {"site-packages", "lib2to3", "test", "tests"} & set(path.parts)
        if not is_left_out and hashlib.sha256(name.encode()).digest()[0] < 20:  # 8 % of the files: about a second
            yield path


def test_the_rest_of_real_files_parses_to_the_same_tree_without_docstrings():
    paths = list(stdlib_sample())
    assert len(paths) > 20
    for path in paths:
        source = decode(path.read_bytes())
        taken = take_apart(source)
        assert ast.dump(ast.parse(taken.code)) == without_docstrings(source), path


def test_every_docstring_of_real_files_is_found_in_order():
    for path in stdlib_sample():
        source = decode(path.read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
        expected = [ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, SCOPES) and ast.get_docstring(n)]
        assert sorted(d.text for d in take_apart(source).docstrings) == sorted(expected), path


SOURCE = '''\
"""About the module."""
import x

@decorated
def f(a,
      b=1) -> int:
    """Add.

        Indented.
    """
    return a + b

class A(B):
    'Only this.'

class C:
    """ü"""; y = 1
    if x:
        async def g(self): """One line."""
    def h(self):
        ("joined "
         "strings")  # a comment stays
        return """not me"""
    def empty(self):
        """ """
'''

LEFT = '''\
import x

@decorated
def f(a,
      b=1) -> int:
    return a + b

class A(B):
    pass

class C:
    y = 1
    if x:
        async def g(self): pass
    def h(self):
        # a comment stays
        return """not me"""
    def empty(self):
        pass
'''


def test_docstrings_are_cut_and_come_with_their_signatures():
    taken = take_apart(SOURCE)
    assert taken.code == LEFT
    assert taken.docstrings == [
        Docstring("module", "", "", "About the module."),
        Docstring("function", "f", "def f(a,\n      b=1) -> int:", "Add.\n\nIndented."),
        Docstring("class", "A", "class A(B):", "Only this."),
        Docstring("class", "C", "class C:", "ü"),
        Docstring("function", "C.g", "async def g(self):", "One line."),
        Docstring("function", "C.h", "def h(self):", "joined strings"),
    ]


def test_docstrings_hide_in_match_try_and_else():
    source = "try:\n    pass\nexcept E:\n    def a():\n        'A'\nelse:\n    def b():\n        'B'\n" \
             "finally:\n    def c():\n        'C'\nmatch x:\n    case 1:\n        def d():\n            'D'\n"
    assert [d.text for d in take_apart(source).docstrings] == ["A", "B", "C", "D"]


def test_an_encoding_line_is_obeyed():
    text = "# -*- coding: latin-1 -*-\r\nx = 'ä'\r\n"
    assert decode(text.encode("latin-1")) == text.replace("\r", "")
    for data, error in ((b"x = '\xe4'\n", SyntaxError), (b"\n\nx = '\xe4'\n", UnicodeDecodeError)):
        with pytest.raises(error):
            decode(data)


def test_what_is_no_python_raises():
    with pytest.raises(SyntaxError):
        take_apart("print 'two'\n")
