"""Which fields of a config are part of a result's identity, and how a later field stays out of old ids.

Every field of every schema dataclass is declared with `semantic` (a different value is a different result)
or `execution` (it is not: speed, place, logging). A field without a declaration fails tests/config/test_schema.py.

In the tables that are semantic as a whole (block specs, the stack and its norm, a task builder's options) a plain
field is semantic; one that is added later is declared as

    softcap: float = semantic(0.0, absent=0.0)

and stays out of the ids while it equals `absent`. Read back from a semantic block, a missing key is `absent`, not the
default: a default may change freely, `absent` never.
"""

from __future__ import annotations

import dataclasses
import math
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


def absents(cls: Any) -> dict[str, Any]:
    """Field name -> `absent` value, of the fields of a dataclass that declare one."""
    fields = dataclasses.fields(cls)
    return {field.name: field.metadata[_ABSENT] for field in fields if _ABSENT in field.metadata}


def semantic_dict(node: Any) -> dict[str, Any]:
    """The semantic fields of a dataclass as plain data, those equal to their `absent` value left out."""
    return _dict(node, whole=False)


def table_dict(node: Any) -> dict[str, Any]:
    """The same of a dataclass that is semantic as a whole: its plain fields count too."""
    return _dict(node, whole=True)


def round12(x: float) -> float:
    """x to 12 significant digits, never −0.0: what a float is rounded to before it is trained with and hashed.

    Raises ValueError for NaN and infinities.
    """
    if not math.isfinite(x):
        raise ValueError(f"round12({x}): only finite numbers can be part of an id.")
    return float(f"{x:.12g}") + 0.0  # −0.0 + 0.0 is 0.0


def _dict(node: Any, whole: bool) -> dict[str, Any]:
    absent = absents(node)
    result: dict[str, Any] = {}
    for field in dataclasses.fields(node):
        name, kind = f"{type(node).__name__}.{field.name}", kind_of(field)
        if whole:
            assert kind != "execution", f"{name} is declared execution, in a table that is semantic as a whole"
        else:
            assert kind is not None, f"{name} is declared neither semantic nor execution"
        value = getattr(node, field.name)
        if kind == "execution" or (field.name in absent and value == absent[field.name]):
            continue
        result[field.name] = _plain(value, whole)
    return result


def _plain(value: Any, whole: bool) -> Any:
    if dataclasses.is_dataclass(value):
        return _dict(value, whole)
    if isinstance(value, dict):
        return {key: _plain(item, whole) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, whole) for item in value]
    return value
