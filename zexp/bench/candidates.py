"""Sizes of one architecture that have about the same number of parameters, one thing changed at a time. No torch.

The base is what `arch.match={parameters: …}` chooses. From it a candidate differs in the model width (its MLPs solved anew), in
the width of its MLPs, in how a block is cut into heads, or in the rows of the embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zexp.blocks.base import BlockSpec
from zexp.blocks.resolve import resolve_model, specs_of
from zexp.calc import match
from zexp.calc import model as calc
from zexp.config.errors import ConfigError

MULTIPLES = (8, 16, 32, 64, 128, 256)  # of model widths: what tiles of matrix units divide
INNER = (8, 64, 128, 256)
ROWS = (8, 64, 128, 256, 512)
NEARBY = 0.25  # of the base's width, to both sides
BASE, WIDTH, MLP, HEADS, VOCABULARY, COMBINED = "base", "width", "mlp", "heads", "vocabulary", "combined"


@dataclass(frozen=True)
class Candidate:
    """One size. factor: what differs from the base; keys: all sizes that do, key -> value; arch: as it would be written."""

    factor: str
    keys: dict[str, int]
    arch: dict[str, Any]
    model: dict[str, Any]
    parameters: int

    @property
    def name(self) -> str:
        if not self.keys:
            return f"base: width {self.model['width']}"
        return ", ".join(f"{key.removeprefix('arch.').removeprefix('blocks.')} {value}" for key, value in self.keys.items())

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "factor": self.factor, "keys": self.keys, "width": self.model["width"],
            "vocab_size": self.model["vocab_size"], "parameters": self.parameters,
            "alignment": {key: alignment(value) for key, value in self.keys.items()},
        }  # fmt: skip


def candidates(
    arch: Mapping[str, Any], vocab_size: int, parameters: int, tolerance: float, widths: list[int] | None = None
) -> list[Candidate]:
    """The base first. tolerance: how far from the target a candidate may be, as a share of it. widths: model widths to try
    instead of the multiples nearby. Raises ConfigError as arch.match does, and for a width that cannot be had."""
    base = _base(arch, vocab_size, parameters, tolerance)
    made = [base]
    problems = []
    for width in _nearby(base.model["width"]) if widths is None else widths:
        size = match.at_width(base.arch, vocab_size, parameters, width)
        one = (
            None
            if size is None
            else _candidate(WIDTH, _changed(base.arch, size.chosen), _with(base.arch, size.chosen), vocab_size)
        )
        if widths is not None and (one is None or not _is_near(one, parameters, tolerance)):
            what = "no number of heads is legal there" if one is None else f"the nearest size has {one.parameters:,} parameters"
            problems.append(f"--width {width}: {what}. Take another width, or a larger --tolerance than {tolerance:g}.")
        made += [one] if one is not None else []
    if problems:
        raise ConfigError(problems)
    for factor, keys in (*_inner(base), *_heads(base), *_rows(base, vocab_size)):
        one = _candidate(factor, keys, _with(base.arch, keys), vocab_size)
        made += [one] if one is not None else []
    return _distinct(one for one in made if one is base or _is_near(one, parameters, tolerance))


def _base(arch: Mapping[str, Any], vocab_size: int, parameters: int, tolerance: float) -> Candidate:
    """What arch.match chooses; where nothing is as near as it asks, the nearest there is."""
    resolve_model(arch, vocab_size)  # an architecture that is wrong says so, not that no size fits
    try:
        _, found = match.resolve({**arch, "match": {"parameters": parameters}}, vocab_size, 1)
    except ConfigError:
        size = match.nearest(arch, vocab_size, parameters)
        if abs(size.value / parameters - 1) > tolerance:
            raise ConfigError(
                f"--parameters {parameters:,}: the nearest size of this architecture has {size.value:,.0f} "
                f"({size.value / parameters - 1:+.1%}), at width {size.model['width']}, and --tolerance is {tolerance:.0%}.\n"
                "  Take that as the target, a larger tolerance, or another number of layers (arch.pattern)."
            ) from None
        chosen = size.chosen
    else:
        assert found is not None, "it was asked for"
        chosen = {key: new for key, (_, new) in found.changed.items() if new is not None}
    base = _candidate(BASE, {}, _with(arch, chosen), vocab_size)
    assert base is not None, "match has resolved it"
    return base


def combined(base: Candidate, chosen: list[Candidate], vocab_size: int) -> Candidate | None:
    """What several candidates change, together; None where that is not legal or is one of them."""
    keys: dict[str, int] = {}
    for one in chosen:
        keys |= {key: value for key, value in one.keys.items() if key not in keys}
    if len(chosen) < 2:
        return None
    return _candidate(COMBINED, keys, _with(base.arch, keys), vocab_size)


def alignment(value: int) -> int:
    """The largest power of two that divides it, at most 1024."""
    return min(value & -value, 1024)


def _nearby(width: int) -> list[int]:
    """Multiples of each power of two next to a width, on both sides."""
    found = {
        side for step in MULTIPLES for side in (width // step * step, width // step * step + step, width // step * step - step)
    }
    return sorted(one for one in found if one != width and abs(one / width - 1) <= NEARBY and one > 0)


def _inner(base: Candidate) -> Iterator[tuple[str, dict[str, int]]]:
    """MLP widths that are multiples of more, and of less, than the base's."""
    specs = specs_of(base.model)
    for step in INNER:
        keys = {}
        for letter, spec in specs.items():
            for key in spec.SCALED_WIDTHS:
                if size := getattr(spec, key):
                    rounded = max(step, round(size / step) * step)
                    keys[f"arch.blocks.{letter}.{key}"] = rounded + (step if step == INNER[0] and rounded == size else 0)
        changed = _changed(base.arch, keys)
        if changed:
            yield MLP, changed


def _heads(base: Candidate) -> Iterator[tuple[str, dict[str, int]]]:
    """Twice and half as many heads, half and twice as wide, of one block at a time."""
    for letter, spec in specs_of(base.model).items():
        for times in (2, 1):
            keys = _recut(base, letter, spec, times, 3 - times)
            if keys:
                yield HEADS, keys


def _recut(base: Candidate, letter: str, spec: BlockSpec, more: int, less: int) -> dict[str, int]:
    """Keys of a block with more / less times as many heads; none where they do not come out whole."""
    written = (base.arch.get("blocks") or {}).get(letter) or {}
    keys = {}
    for key in spec.SCALED_HEADS:
        if (count := written.get(key)) is not None:
            if count * more % less:
                return {}
            keys[key] = count * more // less
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if not field.name.endswith("head_dim") or value is None or (spec.SCALED_HEADS and written.get(field.name) is None):
            continue
        if value * less % more:
            return {}
        keys[field.name] = value * less // more
    return {f"arch.blocks.{letter}.{key}": value for key, value in keys.items()}


def _rows(base: Candidate, vocab_size: int) -> Iterator[tuple[str, dict[str, int]]]:
    """The vocabulary filled up to multiples."""
    have = base.model["vocab_size"]
    for step in ROWS:
        if (rows := -(-have // step) * step) != have:
            yield VOCABULARY, {"arch.vocab_size": rows}


def _candidate(factor: str, keys: dict[str, int], arch: dict[str, Any], vocab_size: int) -> Candidate | None:
    try:
        model = resolve_model(arch, vocab_size)
    except ConfigError:  # heads or widths that a block cannot have: no candidate
        return None
    return Candidate(factor, keys, arch, model, calc.parameters(model)["total"])


def _with(arch: Mapping[str, Any], keys: Mapping[str, int]) -> dict[str, Any]:
    """The architecture with other sizes; keys as a command line has them."""
    made = {**arch, "blocks": {letter: dict(table or {}) for letter, table in (arch.get("blocks") or {}).items()}}
    for key, value in keys.items():
        _, first, *rest = key.split(".")
        if rest:
            made["blocks"].setdefault(rest[0], {})[rest[1]] = value
        else:
            made[first] = value
    return made


def _changed(arch: Mapping[str, Any], keys: Mapping[str, int]) -> dict[str, int]:
    """Those keys whose values differ from what the architecture has."""
    found = {}
    for key, value in keys.items():
        _, first, *rest = key.split(".")
        have = ((arch.get("blocks") or {}).get(rest[0]) or {}).get(rest[1]) if rest else arch.get(first)
        if have != value:
            found[key] = value
    return found


def _is_near(one: Candidate, parameters: int, tolerance: float) -> bool:
    return abs(one.parameters / parameters - 1) <= tolerance


def _distinct(found: Iterator[Candidate]) -> list[Candidate]:
    kept: list[Candidate] = []
    for one in found:
        if all(one.model != other.model for other in kept):
            kept.append(one)
    return kept
