"""What a study says, as the list of its points: named overrides, each composed into one variant.

A point is (grid × zip × arms × seeds) less the exclusions, with the command line on top: an axis given there replaces
the study's, and a plain override there wins over everything. Nothing here knows Hydra; overrides are strings.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zexp.config.errors import ConfigError, Problems

# Keys whose values name a file of that group: they stand bare in a variant's name.
GROUPS = (
    "arch", "corpus", "mix", "schedule", "anneal", "optim", "parallelism", "kernels", "eval", "logger", "scale",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One variant before composition.

    axes: axis -> value, in the order grid, zip, arm, seed; overrides: what Hydra composes, later wins.
    """

    axes: dict[str, Any]
    overrides: list[str]


class Typed(str):
    """A value in Hydra's grammar already, as typed on the command line."""


@dataclass(frozen=True)
class CommandLine:
    """Overrides as typed: fixed ones, and axes with several values (each a value in Hydra's grammar)."""

    fixed: list[str] = field(default_factory=list)
    axes: dict[str, list[str]] = field(default_factory=dict)


def points(study: Mapping[str, Any], scale: str, command_line: CommandLine, seed: int) -> list[Point]:
    """The study's points in the order grid (last axis fastest), zip, arms, seeds.

    study: the composed `study` node; scale: the chosen scale; seed: the root's seed, used where no axis names one.
    Raises ConfigError with every mistake of the study.
    """
    problems = Problems()
    fixed_keys = {override_key(text) for text in command_line.fixed}
    grid = {key: _values(key, values, "study.grid", problems) for key, values in study["grid"].items()}
    zipped = {key: _values(key, values, "study.zip", problems) for key, values in study["zip"].items()}
    arms: dict[str, list[str]] = {name: list(overrides or []) for name, overrides in study["arms"].items()}
    seeds = study["seeds"]
    lengths = {key: len(values) for key, values in zipped.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{key}: {length}" for key, length in lengths.items())
        problems.add(f"study.zip walks its axes together, but their lengths differ ({found}).")
    for key in sorted(set(grid) & set(zipped)):
        problems.add(f"{key} stands in study.grid and in study.zip. Keep one.")
    for key in [*command_line.axes, *sorted(fixed_keys & (set(grid) | set(zipped) | {"seed"}))]:
        if key in zipped and len(zipped) > 1:
            problems.add(f"{key} is zipped with {', '.join(sorted(set(zipped) - {key}))}; it cannot be replaced alone.")
        zipped.pop(key, None)
        if key in fixed_keys:
            grid.pop(key, None)
            seeds = None if key == "seed" else seeds
    arm_keys = {override_key(text): name for name, overrides in arms.items() for text in overrides}
    for key in sorted(set(arm_keys) & (set(study["grid"]) | set(study["zip"]))):
        problems.add(f"{key} is an axis of study.grid or study.zip, and the arm {arm_keys[key]!r} sets it. Keep one.")
    if "seed" in {*study["grid"], *study["zip"], *arm_keys}:
        problems.add("seed stands in study.grid, study.zip or study.arms; the seeds of a study are study.seeds: [0, 1, 2].")
    for key in sorted((fixed_keys | set(command_line.axes)) & set(arm_keys)):
        problems.add(
            f"{key} on the command line would undo what the arm {arm_keys[key]!r} sets. "
            "Leave it out, or change study.arms."
        )
    for key, texts in command_line.axes.items():
        if key == "seed":
            seeds = texts
        else:
            grid[key] = [Typed(text) for text in texts]
    scales = study["scales"]
    problems.raise_if_any()

    axes: list[list[tuple[tuple[str, Any, list[str]], ...]]] = []
    for key, values in grid.items():
        axes.append([((key, value, [override_text(key, value)]),) for value in values])
    if zipped:
        keys = list(zipped)
        rows = zip(*zipped.values(), strict=True)
        axes.append([tuple((k, v, [override_text(k, v)]) for k, v in zip(keys, row, strict=True)) for row in rows])
    if arms:
        axes.append([(("arm", name, overrides),) for name, overrides in arms.items()])
    if seeds:
        axes.append([(("seed", value, [f"seed={value}"]),) for value in _seeds(seeds, problems)])
        problems.raise_if_any()
    result = []
    for combination in itertools.product(*axes):
        parts = [part for group in combination for part in group]
        named = {name: value for name, value, _ in parts}
        if any(all(_same(named.get(k), v) for k, v in excluded.items()) for excluded in study["exclude"]):
            continue
        before = list(scales.get(str(named.get("scale", scale))) or [])
        inner = [text for _, _, overrides in parts for text in overrides]
        result.append(Point(named, last_of_each_key([*before, *inner, *command_line.fixed])))
    _check_exclusions(study["exclude"], axes, problems)
    if not result:
        problems.add("study: every combination is excluded; nothing is left to run.")
    problems.raise_if_any()
    return result


def row_of(axes: Mapping[str, Any], arch: str, anneal: str | None) -> str:
    """The name of a variant without its seed; without axes, its architecture and anneal."""
    parts = [_part(key, value) for key, value in axes.items() if key != "seed"]
    if not parts:
        parts = [arch] if anneal is None else [arch, anneal]
    return ",".join(parts)


def name_of(axes: Mapping[str, Any], arch: str, anneal: str | None) -> str:
    """The name of a variant, e.g. `zamba2_tiny,replay60,seed=1`."""
    row = row_of(axes, arch, anneal)
    return f"{row},seed={axes['seed']}" if "seed" in axes else row


def _part(key: str, value: Any) -> str:
    if key in (*GROUPS, "arm"):
        return str(value)
    last = key.rsplit(".", 1)[-1]
    return f"{key if last == 'seed' else last}={value}"  # anneal.seed is not the seed


def override_key(text: str) -> str:
    """The key of an override: `+a.b=1`, `~a.b`, `a.b@c=1` -> `a.b`, `a.b`, `a.b@c`."""
    return text.split("=", 1)[0].lstrip("+~")


def last_of_each_key(overrides: Sequence[str]) -> list[str]:
    """The overrides with each key once, its last value, at its last place."""
    last = {override_key(text): i for i, text in enumerate(overrides)}
    return [text for i, text in enumerate(overrides) if last[override_key(text)] == i]


_PLAIN = re.compile(r"[A-Za-z_/][\w./:%+@-]*")
_WORDS = ("null", "true", "false", "inf", "nan")  # Hydra reads them as values, in any case of their letters


def override_text(key: str, value: Any) -> str:
    """`key=value` in Hydra's grammar."""
    return f"{key}={_grammar(value)}"


def _grammar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, Typed):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{_grammar(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(_grammar(item) for item in value) + "]"
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _same(found: Any, wanted: Any) -> bool:
    return found is not None and str(found) == str(wanted)


def _seeds(values: Sequence[Any], problems: Problems) -> list[int]:
    found = []
    for value in values:
        if re.fullmatch(r"\d{1,19}", str(value)) and int(value) < 2**63:
            if int(value) in found:
                problems.add(f"seed {value} stands twice among the seeds. Name each once.")
            found.append(int(value))
        else:
            problems.add(f"seed = {str(value)!r}: a seed is a whole number from 0 to below 2^63.")
    return found


def _values(key: str, values: Any, where: str, problems: Problems) -> list[Any]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence) or not values:
        problems.add(f"{where}.{key} = {values!r} is no list of values. Write it as [a, b].")
        return []
    return list(values)


def _check_exclusions(
    excluded: Sequence[Mapping[str, Any]], axes: Sequence[Sequence[tuple[tuple[str, Any, list[str]], ...]]], problems: Problems
) -> None:
    known = {name for axis in axes for group in axis for name, _, _ in group}
    for entry in excluded:
        for key in entry:
            if key not in known:
                problems.add(f"study.exclude names {key!r}, which is no axis. The axes: {', '.join(sorted(known)) or 'none'}.")


def study_name(study: Mapping[str, Any], overrides: Sequence[str], digest: str) -> str:
    """The study's own name, else one made of the overrides and a hash of the variants.

    Raises ConfigError for a name that is no folder name.
    """
    name = study["name"]
    if name is not None:
        if not re.fullmatch(r"[\w.+=,-]{1,80}", name) or name.startswith("."):
            raise ConfigError(f"study.name = {name!r} must be a folder name: letters, digits and _ . + = , - (80 at most).")
        return str(name)
    said = re.sub(r"[^\w.+=,-]+", "_", ",".join(overrides))[:48].strip("_,.") or "run"
    return f"{said}-{digest[:8]}"
