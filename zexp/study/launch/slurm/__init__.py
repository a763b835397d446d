"""Stages as SLURM jobs: submitted through submitit, followed or left alone; the same store as everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zexp.store.folder import Store
from zexp.study.launch.base import OnEvent, Outcome, Stage
from zexp.study.launch.slurm.options import SlurmOptions

__all__ = ["SlurmLaunch", "SlurmOptions", "preflight"]


@dataclass(frozen=True)
class SlurmLaunch:
    """One launch; see launch() in launch/__init__.py for the contract of run()."""

    stages: Sequence[Stage]
    store: Store
    options: SlurmOptions
    on_event: OnEvent
    study: str
    gate: Mapping[str, Any] | None
    detach: bool

    def run(self) -> dict[str, Outcome]:
        from zexp.study.launch.slurm import submit
        from zexp.study.launch.slurm.follow import Follow

        submitted = submit.submit(self.stages, self.store, self.options, self.study, self.gate, self.on_event)
        if self.detach:
            return {stage.id: Outcome(status="submitted") for stage in self.stages}
        return Follow(self.stages, self.store, self.options, self.on_event, self.study, submitted).run()


def preflight(stages: Sequence[Stage], options: SlurmOptions) -> None:
    """Raises ConfigError for what the cluster would refuse, before anything is written or queued."""
    from zexp.config.errors import ConfigError
    from zexp.study.launch.slurm import check, cluster, submit

    cluster.require()
    shapes = submit.shapes_of(stages, options)
    blind = [stage for stage in stages if stage.request.get("device") == "cuda" and not shapes[stage.id].gpus_per_node]
    if blind:
        raise ConfigError(
            f"execution.device = cuda, but hydra.launcher asks for no GPU for {len(blind)} of {len(stages)} stages.\n"
            "  Set hydra.launcher.gpus_per_node=1 (hydra.launcher.train.gpus_per_node, hydra.launcher.eval.gpus_per_node)."
        )
    check.check(list(dict.fromkeys(shapes.values())))
