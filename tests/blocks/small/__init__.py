"""Small tables of every block's keys: tests/blocks/small/<letter>.py has

    TABLES   name -> keys, at WIDTH; together they use every option of the block
    LAYERS   the layers to write the letter as, where it is not the letter alone ("gm" of a shared block)
    WITH     tables of other letters that those layers need

and the tests of what all blocks promise (tests/blocks/test_contract.py, tests/model/test_mixed_patterns.py) run over all.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from zexp.blocks.table import TABLE

WIDTH = 16
LETTERS = sorted(TABLE)


def tables(letter: str) -> dict[str, dict[str, Any]]:
    return dict(import_module(f"tests.blocks.small.{letter}").TABLES)


def layers(letter: str) -> list[str]:
    return list(getattr(import_module(f"tests.blocks.small.{letter}"), "LAYERS", [letter]))


def others(letter: str) -> dict[str, dict[str, Any]]:
    return dict(getattr(import_module(f"tests.blocks.small.{letter}"), "WITH", {}))


def arch(letter: str, name: str) -> dict[str, Any]:
    """Three layers of one block with one of its tables."""
    pattern = " ".join((layers(letter) * 3)[:3])
    return {"pattern": pattern, "width": WIDTH, "blocks": {letter: tables(letter)[name]} | others(letter)}


CASES = [(letter, name) for letter in LETTERS for name in tables(letter)]
IDS = [f"{letter}-{name}" for letter, name in CASES]
