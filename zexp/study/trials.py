"""The points that a sweeper other than zexp's own makes, perhaps in batches: all of one sweep are one study.

Optuna asks for a batch, looks at the scores and asks for the next one. Each batch is planned together with those before
it, whose stages are in the store by then; a point that comes again is the variant that it was.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from zexp.config.errors import ConfigError
from zexp.study.resolve import Composed
from zexp.study.variants import last_of_each_key, override_key

LONG_FLOAT = re.compile(r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?")
LONG = 8  # significant digits from which a number is shortened in a name
SHORT = 4  # digits that stay, more where two values of an axis would look alike


class Trials:
    """One sweep. master: the config that Hydra gives to the launcher.

    direction: minimize, maximize, or None for a sweeper that looks at no score; name: the study's, once the first batch
    has settled it; failed: outcomes of the stages that failed or diverged, by id.
    """

    def __init__(self, master: DictConfig) -> None:
        self._master = master
        self._fixed: set[str] | None = None
        self._known: dict[tuple[tuple[str, Any], ...], Composed] = {}
        self._short: dict[tuple[str, str], str] = {}  # (axis, short form) -> the value that has it
        self.name: str | None = None
        self.failed: dict[str, Any] = {}

    @property
    def sweeper(self) -> str:
        """What stands behind hydra/sweeper=."""
        return str(self._master.hydra.runtime.choices.get("hydra/sweeper"))

    @property
    def direction(self) -> str | None:
        """Which scores the sweeper wants."""
        said = OmegaConf.select(self._master, "hydra.sweeper.direction")
        return None if said is None else str(getattr(said, "name", said))

    @property
    def in_batches(self) -> bool:
        """True if more points may be asked for than those of the first call."""
        return self.direction is not None or OmegaConf.select(self._master, "hydra.sweeper.max_batch_size") is not None

    def points(self, job_overrides: Sequence[Sequence[str]]) -> list[tuple[dict[str, Any], list[str]]]:
        """(axes, overrides) of a batch. Raises ConfigError where the study asks for what this sweeper does not do."""
        if self._fixed is None:
            self._check()
            self._fixed = self._fixed_keys()
        study, points = self._master.study, []
        for overrides in job_overrides:
            given = [text for text in overrides if override_key(text) not in self._fixed]
            axes = {override_key(text): self._said(override_key(text), text.partition("=")[2]) for text in given}
            scale = next((text.partition("=")[2] for text in overrides if override_key(text) == "scale"), self._master.scale)
            points.append((axes, last_of_each_key([*(study.scales.get(scale) or ()), *overrides])))
        return points

    def add(self, composed: Sequence[Composed]) -> list[Composed]:
        """All variants so far, with those of this batch that are new."""
        for one in composed:
            self._known.setdefault(tuple(one.axes.items()), one)
        return list(self._known.values())

    def places(self, composed: Sequence[Composed]) -> list[int]:
        """Where the variants of a batch stand in what `add` returned."""
        place = {key: n for n, key in enumerate(self._known)}
        return [place[tuple(one.axes.items())] for one in composed]

    def _check(self) -> None:
        study, problems = self._master.study, []
        said = [f"study.{key}" for key in ("grid", "zip", "arms", "seeds") if study[key]]
        if said:
            problems.append(
                f"{', '.join(said)}: hydra/sweeper={self.sweeper} makes its own points and would leave these out. "
                "Take hydra/sweeper=zexp, or give the axes to the sweeper."
            )
        if isinstance(OmegaConf.select(self._master, "hydra.sweeper.direction"), ListConfig):
            problems.append("hydra.sweeper.direction is a list, but study.metric is one number. Give one direction.")
        elif self.direction is not None and study.metric is None:
            problems.append(
                f"study.metric is not set: hydra/sweeper={self.sweeper} chooses by it. "
                "Set it to task/metric, e.g. study.metric=bpb_base/bits_per_byte"
            )
        if problems:
            raise ConfigError(problems)

    def _fixed_keys(self) -> set[str]:
        """The keys that have one value throughout: those of the command line and of hydra.sweeper.params without a sweep."""
        params = OmegaConf.select(self._master, "hydra.sweeper.params") or {}
        texts = [f"{key}={value}" for key, value in params.items()] + list(self._master.hydra.overrides.task)
        parsed = OverridesParser.create().parse_overrides(texts)
        swept = {one.get_key_element().lstrip("+~") for one in parsed if one.is_sweep_override()}
        return {one.get_key_element().lstrip("+~") for one in parsed} - swept

    def _said(self, key: str, value: str) -> Any:
        """An axis' value in names: a float with many digits is shortened, as far as it stays apart from earlier ones."""
        if key == "seed" and value.isdigit():
            return int(value)
        if not LONG_FLOAT.fullmatch(value) or len(re.sub(r"[eE].*|[^\d]", "", value).lstrip("0")) <= LONG:
            return value
        for digits in range(SHORT, 17):
            short = f"{float(value):.{digits}g}"
            if self._short.setdefault((key, short), value) == value:
                return short
        return value
