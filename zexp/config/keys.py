"""Keys of a composed config that the schema does not have.

Hydra refuses a misspelt key, but `+key=value` adds whatever it names: what nothing reads would change nothing, silently.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any


def unknown_keys(table: Mapping[str, Any], schema: type, where: str = "") -> list[str]:
    """One text for each key of a plain, nested table that the dataclass `schema` does not have."""
    hints = _hints(schema)
    known = [field.name for field in dataclasses.fields(schema)]
    problems: list[str] = []
    for key, value in table.items():
        path = f"{where}{key}"
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean {where}{near[0]}?" if near else f"There are: {', '.join(known)}."
            problems.append(f"{path}: there is no such key. {hint}")
            continue
        problems += _inside(value, hints[key], path)
    return problems


@cache
def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def _inside(value: Any, hint: Any, path: str) -> list[str]:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Union:
        hint = next(option for option in options if option is not type(None))
        options = typing.get_args(hint)
    if not isinstance(value, Mapping):
        return []
    if dataclasses.is_dataclass(hint):
        return unknown_keys(value, typing.cast(type, hint), f"{path}.")
    if typing.get_origin(hint) is dict and dataclasses.is_dataclass(options[1]):
        return [text for key, item in value.items() for text in _inside(item, options[1], f"{path}.{key}")]
    return []  # a table of anything, such as arch.blocks: its own reader knows its keys
