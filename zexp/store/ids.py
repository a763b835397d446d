"""Ids: sha256 over canonical JSON, so that the same id means the same mathematics.

canonical_json never guesses: what it has no rule for raises, naming the key's path. Written as JSON with
sorted keys, no spaces, ASCII only; ints and floats differ (1 is "1", 1.0 is "1.0"); lists and tuples do not.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from zexp.config.identity import round12

SHORT = 16  # hex digits of an id in folder names; config.yaml holds all 64 and is compared on use


def canonical_json(obj: Any) -> str:
    """The one text of a semantic config.

    Takes dict with str keys, list, tuple, str, bool, int, float and None: those types exactly, no subclasses
    (an enum, a numpy number or an OmegaConf node is to be converted where it is known what it means).
    Raises TypeError for another type, ValueError for NaN, infinities, −0.0, floats of more than 12
    significant digits (see round12) and text that is not valid Unicode.
    """
    parts: list[str] = []
    _write(obj, "", parts)
    return "".join(parts)


def semantic_id(semantic: dict[str, Any]) -> str:
    """64 hex digits: the id of a stage with this semantic block."""
    if type(semantic) is not dict:
        raise TypeError(f"A semantic block is a dict, not {type(semantic).__name__}.")
    return hashlib.sha256(canonical_json(semantic).encode("ascii")).hexdigest()


def short(id: str) -> str:
    """The first 16 hex digits: a folder's name."""
    if len(id) != 64 or not set(id) <= set("0123456789abcdef"):
        raise ValueError(f"{id!r} is not an id: expected 64 lower-case hex digits.")
    return id[:SHORT]


def _write(obj: Any, path: str, parts: list[str]) -> None:
    kind = type(obj)  # exact: bool is an int to isinstance, np.float64 is a float
    if obj is None:
        parts.append("null")
    elif kind is bool:
        parts.append("true" if obj else "false")
    elif kind is int:
        parts.append(str(obj))
    elif kind is float:
        parts.append(_float(obj, path))
    elif kind is str:
        parts.append(_text(obj, path))
    elif kind is list or kind is tuple:
        parts.append("[")
        for i, item in enumerate(obj):
            if i:
                parts.append(",")
            _write(item, f"{path}[{i}]", parts)
        parts.append("]")
    elif kind is dict:
        for key in obj:
            if type(key) is not str:
                where = path or "the top level"
                raise TypeError(f"{where}: key {key!r} is a {type(key).__name__}; keys are str.")
        parts.append("{")
        for i, key in enumerate(sorted(obj)):
            if i:
                parts.append(",")
            inner = f"{path}.{key}" if path else key
            parts.append(_text(key, inner))
            parts.append(":")
            _write(obj[key], inner, parts)
        parts.append("}")
    else:
        raise TypeError(
            f"{path or 'the top level'}: {obj!r} is a {kind.__module__}.{kind.__qualname__}; "
            "an id is made of dict, list, tuple, str, bool, int, float and None only."
        )


def _float(x: float, path: str) -> str:
    where = path or "the top level"
    if not math.isfinite(x):
        raise ValueError(f"{where}: {x} cannot be part of an id.")
    if x == 0.0 and math.copysign(1.0, x) < 0:
        raise ValueError(f"{where}: -0.0 cannot be part of an id; write 0.0.")
    if round12(x) != x:
        raise ValueError(f"{where}: {x!r} has more than 12 significant digits; round12() it in the config.")
    return repr(x)  # the shortest text that reads back as x; it holds a '.' or an 'e', so never an int's


def _text(text: str, path: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # Two lone surrogates would be written like the one character they make up.
        where = path or "the top level"
        raise ValueError(f"{where}: {text!r} is not valid Unicode (a lone surrogate).") from None
    return json.dumps(text, ensure_ascii=True)
