"""`hydra/sweeper=zexp`: a study's grid × zip × arms × seeds, and the axes of the command line."""

from __future__ import annotations

from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class ZexpSweeper(Sweeper):
    """Reads `study` from the composed config and launches its points together."""

    def __init__(self, **options: Any) -> None:
        if options:
            from zexp.config.errors import ConfigError

            raise ConfigError(
                f"hydra.sweeper.{', hydra.sweeper.'.join(options)}: zexp's own sweeper has no options. Another one is chosen on "
                "the command line (hydra/sweeper=optuna): in a study's file the choice comes too late for Hydra."
            )
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """The results of all points, as Hydra's sweepers return them: a list of batches."""
        assert self.launcher is not None
        pairs = self.points(arguments)
        if hasattr(self.launcher, "launch_points"):
            return [self.launcher.launch_points(pairs, 0)]
        return [self.launcher.launch([overrides for _, overrides in pairs], initial_job_idx=0)]

    def points(self, arguments: list[str]) -> list[tuple[dict[str, Any], list[str]]]:
        """The study's points under a command line, as (axes, overrides)."""
        from zexp.config.errors import ConfigError
        from zexp.study.variants import CommandLine, points

        assert self.config is not None and self.hydra_context is not None
        fixed: list[str] = []
        axes: dict[str, list[Any]] = {}
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        for override in parser.parse_overrides(arguments):
            if override.is_sweep_override():
                if not override.is_discrete_sweep():
                    raise ConfigError(f"{override.input_line}: the zexp sweeper takes lists, ranges and globs of values.")
                axes[override.get_key_element()] = axis_of(override)
            else:
                assert override.input_line is not None
                fixed.append(override.input_line)
        study = OmegaConf.to_container(self.config.study, resolve=True)
        assert isinstance(study, dict)
        found = points(study, self.config.scale, CommandLine(fixed, axes), self.config.seed)  # type: ignore[arg-type]
        return [(point.axes, point.overrides) for point in found]


def axis_of(override: Override) -> list[Any]:
    """The values of a sweep override, each as it would be typed and as what it says."""
    from zexp.study.variants import Typed

    return [Typed(Transformer.str(value), Override._convert_value(value)) for value in override.sweep_iterator()]
