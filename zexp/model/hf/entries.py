"""The keys of a config.json, each with the keys of an architecture that it says. One table reads and writes.

Our keys are paths: `width`, `norm.eps`, `blocks.a.heads`. No torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Flat = dict[str, Any]
Config = Mapping[str, Any]

REQUIRED: Any = object()
TINY = 1e-30  # a lower bound of dt that bounds nothing in fp32, and has a logarithm (transformers takes it)


class Unreadable(ValueError):
    """A config.json says what no architecture of ours can be; the text says what."""


class Entry(ABC):
    """One key, or a few that belong together."""

    theirs: str

    @abstractmethod
    def ours(self) -> list[str]:
        """The paths that it says; what stands below `blocks.x.` is left out for a model without the letter x."""

    @abstractmethod
    def write(self, flat: Flat) -> dict[str, Any]:
        """Their keys. What cannot be said becomes what comes nearest: reading it back shows the difference."""

    @abstractmethod
    def read(self, config: Config) -> Flat:
        """Our keys. Raises Unreadable."""


@dataclass(frozen=True)
class Same(Entry):
    """One key for one of ours.

    default: what `transformers` takes where config.json lacks the key, or null: a value, or a function of the config.
    values: ours -> theirs, where words differ. absent: what is written for a model without the letter.
    """

    theirs: str
    path: str
    default: Any = REQUIRED
    values: Mapping[Any, Any] | None = None
    absent: Any = REQUIRED

    def ours(self) -> list[str]:
        return [self.path]

    def write(self, flat: Flat) -> dict[str, Any]:
        if self.path not in flat:
            return {} if self.absent is REQUIRED else {self.theirs: self.absent}
        value = flat[self.path]
        if self.values is not None:
            value = self.values.get(value, next(iter(self.values.values())))
        return {self.theirs: value}

    def read(self, config: Config) -> Flat:
        value = config.get(self.theirs)
        if value is None:
            if self.default is REQUIRED:
                raise Unreadable(f"{self.theirs} is missing.")
            value = self.default(config) if callable(self.default) else self.default
        if self.values is not None:
            back = {theirs: ours for ours, theirs in reversed(list(self.values.items()))}
            if value not in back:
                raise Unreadable(f"{self.theirs} = {value!r}: zexp knows {', '.join(map(repr, back))}.")
            value = back[value]
        return {self.path: value}


@dataclass(frozen=True)
class Fixed(Entry):
    """A key that only has one value that ours can be; default: what `transformers` takes where it is missing."""

    theirs: str
    value: Any
    default: Any = REQUIRED

    def ours(self) -> list[str]:
        return []

    def write(self, flat: Flat) -> dict[str, Any]:
        return {self.theirs: self.value}

    def read(self, config: Config) -> Flat:
        found = config.get(self.theirs, self.value if self.default is REQUIRED else self.default)
        if found != self.value:
            raise Unreadable(f"{self.theirs} = {found!r}: zexp has only {self.value!r}.")
        return {}


@dataclass(frozen=True)
class Always(Entry):
    """A key of ours that every model of the family has, without a key of theirs."""

    path: str
    value: Any
    theirs: str = ""

    def ours(self) -> list[str]:
        return [self.path]

    def write(self, flat: Flat) -> dict[str, Any]:
        return {}

    def read(self, config: Config) -> Flat:
        return {self.path: self.value}


@dataclass(frozen=True)
class Rope(Entry):
    """rope_parameters, and the keys that older files have instead.

    letter: attention's. theta: the default base. fraction: the default share of a head that is turned; None = always
    all of it. old_theta, old_fraction: older names.
    """

    letter: str
    theta: float = 10_000.0
    fraction: float | None = None
    old_theta: str = "rope_theta"
    old_fraction: str = "partial_rotary_factor"
    theirs: str = "rope_parameters"

    def ours(self) -> list[str]:
        keys = ["rope_theta", "rope_scaling", *(["rope_fraction"] if self.fraction is not None else [])]
        return [f"blocks.{self.letter}.{key}" for key in keys]

    def write(self, flat: Flat) -> dict[str, Any]:
        at = f"blocks.{self.letter}."
        if at + "rope_theta" not in flat:
            return {}
        said: dict[str, Any] = {"rope_type": "default", "rope_theta": flat[at + "rope_theta"] or self.theta}
        if self.fraction is not None:
            said["partial_rotary_factor"] = flat[at + "rope_fraction"]
        scaling = flat[at + "rope_scaling"]
        if scaling is not None:
            said |= {
                "rope_type": "llama3",
                "factor": scaling["factor"],
                "low_freq_factor": scaling["low_turns"],
                "high_freq_factor": scaling["high_turns"],
                "original_max_position_embeddings": scaling["original_positions"],
            }
        return {self.theirs: said}

    def read(self, config: Config) -> Flat:
        at = f"blocks.{self.letter}."
        said = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = said.get("rope_type", said.get("type", "default"))
        theta = said.get("rope_theta", config.get(self.old_theta))
        made: Flat = {at + "rope_theta": float(self.theta if theta is None else theta), at + "rope_scaling": None}
        if self.fraction is not None:
            share = said.get("partial_rotary_factor", config.get(self.old_fraction))
            made[at + "rope_fraction"] = float(self.fraction if share is None else share)
        if kind == "llama3":
            made[at + "rope_scaling"] = {
                "factor": float(said["factor"]),
                "low_turns": float(said["low_freq_factor"]),
                "high_turns": float(said["high_freq_factor"]),
                "original_positions": said.get("original_max_position_embeddings") or config["max_position_embeddings"],
            }
        elif kind != "default":
            raise Unreadable(f"rope_parameters.rope_type = {kind!r}: zexp has 'default' and 'llama3'.")
        return made


@dataclass(frozen=True)
class TimeStepLimit(Entry):
    """[lowest, highest] of dt after its softplus; infinity is written as `transformers` writes it."""

    letter: str = "m"
    theirs: str = "time_step_limit"

    def ours(self) -> list[str]:
        return [f"blocks.{self.letter}.dt_min", f"blocks.{self.letter}.dt_max"]

    def write(self, flat: Flat) -> dict[str, Any]:
        low, high = (flat.get(path) for path in self.ours())
        return {self.theirs: [low or 0.0, {"__float__": "Infinity"} if high is None else high]}

    def read(self, config: Config) -> Flat:
        said = config.get(self.theirs)
        low, high = (0.0, None) if said is None else (_finite(one) for one in said)
        return dict(zip(self.ours(), (low or None, high), strict=True))


@dataclass(frozen=True)
class TimeStepMin(Entry):
    """The lower bound of dt where a family takes it from the smallest initial dt, and has no upper one."""

    letter: str = "m"
    theirs: str = "time_step_min"

    def ours(self) -> list[str]:
        return [f"blocks.{self.letter}.dt_min", f"blocks.{self.letter}.dt_max"]

    def write(self, flat: Flat) -> dict[str, Any]:
        return {self.theirs: flat.get(self.ours()[0]) or TINY}

    def read(self, config: Config) -> Flat:
        low = _finite(config.get(self.theirs, 1e-3))
        return dict(zip(self.ours(), (low if low is not None and low > TINY else None, None), strict=True))


def _finite(value: Any) -> float | None:
    """A number; null and infinity, however it is written, are None."""
    if isinstance(value, Mapping):
        value = value.get("__float__")
    number = None if value is None else float(value)
    return None if number == float("inf") else number
