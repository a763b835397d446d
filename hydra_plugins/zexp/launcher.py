"""`hydra/launcher=local` and `slurm`: the variants of a multirun as one study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, env_override, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class ZexpLauncher(Launcher):
    """Composes each variant and hands all of them together to zexp, which trains their tree.

    options: the node hydra.launcher but its _target_; hydra/launcher/*.yaml documents them.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from zexp.hydra_app import is_own_task
        from zexp.study.compose import Composer
        from zexp.study.trials import Trials

        if not is_own_task(task_function):
            name = getattr(task_function, "__qualname__", repr(task_function))
            raise ValueError(
                f"hydra/launcher={self.options.get('backend')} runs zexp's stages, not the task function {name!r}. "
                "Use another launcher for it."
            )
        self.config = config
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.composer = Composer(hydra_context.config_loader, config)
        self.trials = Trials(config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """What other sweepers (basic, optuna) call, perhaps in batches: their points accumulate in one study."""
        points = self.trials.points(job_overrides)
        returns = self._launch(points, initial_job_idx, self.trials)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)  # sweepers write there and rely on it
        return returns

    def launch_points(
        self, points: Sequence[tuple[dict[str, Any], list[str]]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Variants as (axes, overrides): what zexp's sweeper calls, once. One JobReturn each, in order."""
        return self._launch(points, initial_job_idx, None)

    def launch_rung(
        self, points: Sequence[tuple[dict[str, Any], list[str]]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """The same in several calls, whose points accumulate in one study: what zexp's halving calls."""
        return self._launch(points, initial_job_idx, self.trials)

    def _launch(self, points: Sequence[tuple[dict[str, Any], list[str]]], first: int, trials: Any) -> list[JobReturn]:
        from zexp.hydra_app import act_on
        from zexp.study.jobs import Jobs

        setup_globals()
        made = [self.composer.compose(axes, overrides, first + n) for n, (axes, overrides) in enumerate(points)]
        jobs = Jobs(made, self.hydra_context, self.task_function)
        composed = [one.composed for one in made]
        with env_override(OmegaConf.to_container(self.config.hydra.job.env_set, resolve=True)):  # type: ignore[arg-type]
            return jobs.end(act_on(composed, OmegaConf.create(self.options), jobs.start, trials))
