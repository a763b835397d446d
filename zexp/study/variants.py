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
    """A value in Hydra's grammar already, as typed on the command line. value: what it says."""

    value: Any

    def __new__(cls, text: str, value: Any = None) -> Typed:
        made = super().__new__(cls, text)
        made.value = text if value is None and text.lower() != "null" else value
        return made


@dataclass(frozen=True)
class CommandLine:
    """Overrides as typed: fixed ones, and axes with several values (a plain string is a value in Hydra's grammar)."""

    fixed: list[str] = field(default_factory=list)
    axes: Mapping[str, Sequence[str]] = field(default_factory=dict)


def points(study: Mapping[str, Any], scale: str, command_line: CommandLine, seed: int) -> list[Point]:
    """The study's points in the order grid (last axis fastest), zip, arms, seeds.

    study: the composed `study` node; scale: the chosen scale; seed: the root's seed, used where no axis names one.
    Raises ConfigError with every mistake of the study.
    """
    problems = Problems()
    fixed = {override_key(text): text.partition("=")[2] for text in command_line.fixed}
    typed = {
        override_key(key): (key, [text if isinstance(text, Typed) else Typed(text) for text in texts])
        for key, texts in command_line.axes.items()
    }
    grid = {key: _values(key, values, "study.grid", problems) for key, values in study["grid"].items()}
    zipped = {key: _values(key, values, "study.zip", problems) for key, values in study["zip"].items()}
    arms: dict[str, list[str]] = {name: list(overrides or []) for name, overrides in study["arms"].items()}
    seeds = study["seeds"]
    own = {**grid, **zipped, "arm": list(arms), "seed": list(seeds or ())}
    for key in sorted(set(grid) & set(zipped)):
        problems.add(f"{key} stands in study.grid and in study.zip. Keep one.")
    arm_keys = {override_key(text): name for name, overrides in arms.items() for text in overrides}
    for key in sorted(set(arm_keys) & (set(grid) | set(zipped))):
        problems.add(f"{key} is an axis of study.grid or study.zip, and the arm {arm_keys[key]!r} sets it. Keep one.")
    if "seed" in {*grid, *zipped, *arm_keys}:
        problems.add("seed stands in study.grid, study.zip or study.arms; the seeds of a study are study.seeds: [0, 1, 2].")
    for key in sorted((set(fixed) | set(typed)) & set(arm_keys)):
        problems.add(
            f"{key} on the command line would undo what the arm {arm_keys[key]!r} sets. "
            "Leave it out, or change study.arms."
        )
    replaced = [key for key in zipped if key in fixed or key in typed]
    if replaced and len(replaced) < len(zipped):
        rest = ", ".join(sorted(set(zipped) - set(replaced)))
        problems.add(f"{', '.join(replaced)} is zipped with {rest}; it cannot be replaced alone. Give all of them.")
    together = bool(zipped) and all(key in typed for key in zipped)  # all replaced by lists: they are still walked together
    for key in fixed:
        grid.pop(key, None)
        seeds = None if key == "seed" else seeds
    spelled = {key: text for key, (text, _) in typed.items()}  # with its + or ++
    for key, (_, values) in typed.items():
        if key == "seed":
            seeds = [text.value for text in values]
        elif together and key in zipped:
            zipped[key] = values
        else:
            grid[key] = values
    if not together:
        for key in replaced:
            zipped.pop(key)
    lengths = {key: len(values) for key, values in zipped.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{key}: {length}" for key, length in lengths.items())
        problems.add(f"study.zip walks its axes together, but their lengths differ ({found}).")
    scales = study["scales"]
    problems.raise_if_any()

    def part(key: str, value: Any) -> tuple[str, Any, list[str]]:
        said = value.value if isinstance(value, Typed) else value
        return key, said, [override_text(spelled.get(key, key), value)]

    axes: list[list[tuple[tuple[str, Any, list[str]], ...]]] = []
    for key, values in grid.items():
        axes.append([(part(key, value),) for value in values])
    if zipped:
        rows = zip(*zipped.values(), strict=True)
        axes.append([tuple(part(key, value) for key, value in zip(zipped, row, strict=True)) for row in rows])
    if arms:
        axes.append([(("arm", name, overrides),) for name, overrides in arms.items()])
    if seeds:
        axes.append([(("seed", value, [f"seed={value}"]),) for value in _seeds(seeds, problems)])
        problems.raise_if_any()
    exclusions = _Exclusions(study["exclude"], own, fixed)
    result = []
    for combination in itertools.product(*axes):
        parts = [part for group in combination for part in group]
        named = {name: value for name, value, _ in parts}
        if exclusions.leave_out(named):
            continue
        before = list(scales.get(str(named.get("scale", scale))) or [])
        inner = [text for _, _, overrides in parts for text in overrides]
        result.append(Point(named, last_of_each_key([*before, *inner, *command_line.fixed])))
    exclusions.check({name for axis in axes for group in axis for name, _, _ in group}, bool(fixed or typed), problems)
    if not result:
        problems.add("study: every combination is excluded; nothing is left to run.")
    problems.raise_if_any()
    return result


class _Exclusions:
    """study.exclude: each entry leaves out the points that have all its values.

    own: the study's axes before the command line; fixed: what the command line sets to one value.
    """

    def __init__(
        self, entries: Sequence[Mapping[str, Any]], own: Mapping[str, Sequence[Any]], fixed: Mapping[str, str]
    ) -> None:
        self._entries = [dict(entry) for entry in entries]
        self._own = {key: values for key, values in own.items() if values}
        self._fixed = {key: _read(text) for key, text in fixed.items()}
        self._met = [False] * len(self._entries)

    def leave_out(self, named: Mapping[str, Any]) -> bool:
        point = {**self._fixed, **named}
        met = [all(k in point and _same(point[k], v) for k, v in entry.items()) for entry in self._entries]
        self._met = [before or now for before, now in zip(self._met, met, strict=True)]
        return any(met)

    def check(self, axes: set[str], narrowed: bool, problems: Problems) -> None:
        """Name the entries that can be no more than typos. narrowed: the command line took values away."""
        known = axes | set(self._own)
        for entry, met in zip(self._entries, self._met, strict=True):
            said = "{" + ", ".join(f"{key}: {value_text(value)}" for key, value in entry.items()) + "}"
            if not entry:
                problems.add("study.exclude has an empty entry, which would leave out everything. Remove it.")
            elif wrong := [key for key in entry if key not in known]:
                names = ", ".join(sorted(known)) or "none"
                problems.extend(f"study.exclude names {key!r}, which is no axis. The axes: {names}." for key in wrong)
            elif not met and not (narrowed and self._meant(entry)):
                values = "; ".join(
                    f"{key}: {', '.join(value_text(value) for value in self._own.get(key, ()))}" for key in entry if key in self._own
                )
                problems.add(f"study.exclude: {said} leaves out nothing. Correct it, or remove it. The axes have {values}.")

    def _meant(self, entry: Mapping[str, Any]) -> bool:
        """True if the study itself has these values, or they are of an axis that the command line brought."""
        return all(key not in self._own or any(_same(own, v) for own in self._own[key]) for key, v in entry.items())


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
        return value_text(value)
    last = key.rsplit(".", 1)[-1]
    return f"{key if last == 'seed' else last}={value_text(value)}"  # anneal.seed is not the seed


def value_text(value: Any) -> str:
    """A value as names and messages say it: null, true and false as in YAML, all else as Python does."""
    if value is None or isinstance(value, bool):
        return _grammar(value)
    return str(value)


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
    """True for one value, however it was written: 1e-3 and 0.001, true and True, 1 and '1'."""
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in (found, wanted)]
    return found == wanted if all(numbers) else value_text(found) == value_text(wanted)


def _read(text: str) -> Any:
    """A plain value in Hydra's grammar, as far as an exclusion can name it."""
    if text.lower() in ("null", "true", "false"):
        return {"null": None, "true": True, "false": False}[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


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
