"""A table of keys, as composed from YAML or as it stands in a semantic block, to a typed dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from zexp.config.identity import absents, round12

T = TypeVar("T")


def read(cls: type[T], table: object, where: str, stored: bool = False) -> tuple[T | None, list[str]]:
    """The dataclass that `table` describes, or None and the problems: unknown and missing keys, wrong types.

    Integers are taken for floats and made floats (10000 and 10000.0 are one rope_theta), and floats are rounded to the
    12 digits that ids have; nothing else is converted.
    stored: `table` is from a semantic block, where a missing key means its `absent` value and never the default.
    """
    if not isinstance(table, Mapping):
        return None, [f"{where} = {table!r}: a table of keys is expected."]
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    problems: list[str] = []
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(fields)}."
            problems.append(f"{where}.{key}: there is no such key. {hint}")
            continue
        values[key], wrong = _value(hints[key], value, f"{where}.{key}", stored)
        problems += wrong
    missing = {name: field for name, field in fields.items() if name not in table}
    if stored:
        absent = absents(cls)
        values |= {name: absent[name] for name in missing if name in absent}
        problems += [
            f"{where}.{name}: this semantic block lacks the key, which declares no `absent` value."
            for name in missing
            if name not in absent
        ]
    else:
        problems += [
            f"{where}.{name}: this key has no default and is missing."
            for name, field in missing.items()
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ]
    return (None, problems) if problems else (cls(**values), [])


def _value(hint: Any, value: Any, where: str, stored: bool) -> tuple[Any, list[str]]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None, []
        inner = next(option for option in options if option is not type(None))
        read_value, wrong = _value(inner, value, where, stored)
        return read_value, [text.replace(" is expected", " or null is expected") for text in wrong]
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value, []
        return None, [f"{where} = {value!r}: choose one of {', '.join(map(str, choices))}."]
    if dataclasses.is_dataclass(hint):
        return read(typing.cast(type, hint), value, where, stored)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return round12(float(value)), []
    if hint in (bool, int, str) and type(value) is hint:
        return value, []
    name = {int: "an integer", float: "a finite number", bool: "true or false", str: "a word"}[hint]
    return None, [f"{where} = {value!r}: {name} is expected."]
