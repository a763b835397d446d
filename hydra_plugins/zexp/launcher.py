"""`hydra/launcher=local`: the variants of a multirun as one study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


class ZexpLauncher(Launcher):
    """Composes each variant and hands all of them together to zexp, which trains their tree.

    options: the node hydra.launcher but its _target_; hydra/launcher/*.yaml documents them.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from zexp.hydra_app import is_own_task

        if not is_own_task(task_function):
            name = getattr(task_function, "__qualname__", repr(task_function))
            raise ValueError(
                f"hydra/launcher={self.options.get('backend')} runs zexp's stages, not the task function {name!r}. "
                "Use another launcher for it."
            )
        self.config = config
        self.hydra_context = hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Variants named by those of their overrides that differ: what other sweepers (basic, optuna) call."""
        made = [_axes_of(overrides) for overrides in job_overrides]
        fixed = {key for key in made[0] if len({str(axes.get(key)) for axes in made}) == 1} if len(made) > 1 else set()
        axes = [{key: value for key, value in one.items() if key not in fixed} for one in made]
        pairs = [(named, list(overrides)) for named, overrides in zip(axes, job_overrides, strict=True)]
        return self.launch_points(pairs, initial_job_idx)

    def launch_points(
        self, points: Sequence[tuple[dict[str, Any], list[str]]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Variants as (axes, overrides): what zexp's sweeper calls. One JobReturn each, in order."""
        from zexp.hydra_app import act_on
        from zexp.study.resolve import Composed

        assert self.config is not None and self.hydra_context is not None
        setup_globals()
        composed = []
        for index, (axes, overrides) in enumerate(points):
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.num = initial_job_idx + index
            choices = dict(config.hydra.runtime.choices)
            with open_dict(config):
                del config["hydra"]
            composed.append(Composed(config, choices, axes, list(overrides)))
        return act_on(composed, OmegaConf.create(self.options))


def _axes_of(overrides: Sequence[str]) -> dict[str, Any]:
    axes: dict[str, Any] = {}
    for text in overrides:
        key, _, value = text.lstrip("+~").partition("=")
        axes[key] = value
    return axes
