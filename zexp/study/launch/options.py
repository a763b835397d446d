"""How stages are run: what every launcher knows, and what each adds. Nothing here changes a result.

The keys are those of the node hydra.launcher; conf/hydra/launcher/*.yaml says what they mean to a user.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zexp.config.errors import ConfigError

WHERE = "hydra.launcher"


@dataclass(frozen=True, kw_only=True)
class LauncherOptions:
    """What every launcher knows."""

    backend: str
    grace_seconds: float = 30.0  # after an interruption: how long stages may take to write a state
    retries: int = 0  # how often a failed stage is started again; each reason stays in its attempt's folder
    max_failures: int | None = None  # after so many failed stages nothing more is started; None = never stop
    preload: tuple[str, ...] = ("torch", "zexp.train.loop")  # imported once by each slot or job (where it forks)
    handlers: dict[str, str] = field(default_factory=dict)  # kind -> "module:function", instead of the table's

    def problems(self) -> list[str]:
        """Everything that is wrong with the values, as far as they tell."""
        found = []
        if not is_number(self.grace_seconds) or self.grace_seconds < 0:
            found.append(f"{WHERE}.grace_seconds = {self.grace_seconds!r}: give seconds from 0 on.")
        if not is_whole(self.retries) or self.retries < 0:
            found.append(f"{WHERE}.retries = {self.retries!r}: give a number from 0 on.")
        if self.max_failures is not None and (not is_whole(self.max_failures) or self.max_failures < 1):
            found.append(f"{WHERE}.max_failures = {self.max_failures!r}: give a number from 1 on, or null to never stop.")
        return found

    def check(self) -> None:
        """Raise ConfigError with everything that is wrong."""
        if found := self.problems():
            raise ConfigError(found)


@dataclass(frozen=True, kw_only=True)
class LocalOptions(LauncherOptions):
    """Slots of this machine."""

    backend: str = "local"
    slots: int | None = None  # at most so many at once; None = as many as the machine has
    gpus_per_stage: int = 1  # so many GPUs for each stage
    stages_per_gpu: int = 1  # so many stages share a GPU
    start_method: str = "spawn" if platform.system() == "Darwin" else "fork"

    def problems(self) -> list[str]:
        found = super().problems()
        if self.slots is not None and (not is_whole(self.slots) or self.slots < 1):
            found.append(f"{WHERE}.slots = {self.slots!r}: give a number from 1 on, or null for the whole machine.")
        for key in ("gpus_per_stage", "stages_per_gpu"):
            value = getattr(self, key)
            if not is_whole(value) or value < 1:
                found.append(f"{WHERE}.{key} = {value!r}: give a number from 1 on.")
        if not found and self.gpus_per_stage > 1 and self.stages_per_gpu > 1:
            found.append(
                f"{WHERE}.gpus_per_stage = {self.gpus_per_stage} and stages_per_gpu = {self.stages_per_gpu}: a stage has "
                "several GPUs, or a GPU has several stages. Leave one of the two at 1."
            )
        if self.start_method not in ("fork", "spawn"):
            found.append(f"{WHERE}.start_method = {self.start_method!r}: give fork or spawn.")
        return found


def options_of(launcher: Mapping[str, Any]) -> LauncherOptions:
    """The options in the node hydra.launcher. Raises ConfigError for an unknown launcher, unknown keys and wrong values."""
    from zexp.study.launch.slurm.options import SlurmOptions  # which is made of what stands here

    kinds: dict[str, type[LauncherOptions]] = {"local": LocalOptions, "slurm": SlurmOptions}
    given = {str(key): value for key, value in launcher.items() if key != "_target_"}
    kind = kinds.get(str(given.get("backend")))
    if kind is None:
        raise ConfigError(
            f"{WHERE}.backend = {given.get('backend')!r}: there is no such launcher. There are: {', '.join(kinds)}."
        )
    known = [one.name for one in dataclasses.fields(kind)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(
            [f"{WHERE}.{key}: there is no such option. There are: {', '.join(sorted(known))}." for key in unknown]
        )
    options = kind(**given)
    options.check()
    return options


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return is_whole(value) or isinstance(value, float)
