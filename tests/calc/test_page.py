"""The numbers of docs/calc.md are those that its commands print."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from tests.composed import config
from zexp.study.describe import describe
from zexp.study.resolve import Composed

PAGE = (Path(__file__).parents[2] / "docs/calc.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(arch=[^`]*)` \| `([\w.]+)` \| ([\d,]+) \|$", PAGE, re.MULTILINE)


@cache
def answer(command: str):
    (found,) = describe([Composed(config(*shlex.split(command)), {"arch": "x"}, {}, [])])
    return found


@pytest.mark.parametrize(("command", "key", "value"), ROWS)
def test_the_command_prints_the_number_of_the_page(command, key, value):
    found = answer(command)
    for part in key.split("."):
        found = found[part]
    assert f"{found:,.0f}" == value


def test_the_page_has_numbers():
    assert len(ROWS) >= 20
