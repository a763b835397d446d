"""Which fields of the schema are part of a result's identity, and how a later field stays out of old ids.

Every field of every schema dataclass is declared with `semantic` (a different value is a different result)
or `execution` (it is not: speed, place, logging). A field without a declaration fails tests/config/test_schema.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

_KIND = "identity"
_ABSENT = "absent"
_NOTHING: Any = object()


def semantic(default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING, absent: Any = _NOTHING) -> Any:
    """A field that changes the result. absent: for a field added later, the value that means "as before"."""
    return _field("semantic", default, factory, absent)


def execution(default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING) -> Any:
    """A field that does not change the result: no id depends on it."""
    return _field("execution", default, factory, _NOTHING)


def _field(kind: str, default: Any, factory: Any, absent: Any) -> Any:
    metadata = {_KIND: kind} if absent is _NOTHING else {_KIND: kind, _ABSENT: absent}
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    if default is not dataclasses.MISSING:
        return dataclasses.field(default=default, metadata=metadata)
    return dataclasses.field(metadata=metadata)


def kind_of(field: dataclasses.Field[Any]) -> str | None:
    """'semantic', 'execution' or None where the declaration was forgotten."""
    return field.metadata.get(_KIND)


def semantic_dict(node: Any) -> dict[str, Any]:
    """The semantic fields of a dataclass as plain data, those equal to their `absent` value left out."""
    result: dict[str, Any] = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        kind = kind_of(field)
        assert kind is not None, f"{type(node).__name__}.{field.name} is declared neither semantic nor execution"
        if kind != "semantic" or (_ABSENT in field.metadata and value == field.metadata[_ABSENT]):
            continue
        result[field.name] = _plain(value)
    return result


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return semantic_dict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
