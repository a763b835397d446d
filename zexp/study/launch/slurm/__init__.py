"""Stages as SLURM jobs: submitted through submitit, followed or left alone; the same store as everywhere."""

from __future__ import annotations

import os
import sys
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
    failed: int

    def run(self) -> dict[str, Outcome]:
        from zexp.study.launch.slurm import submit
        from zexp.study.launch.slurm.follow import Follow

        submitted = submit.submit(self.stages, self.store, self.options, self.study, self.gate, self.failed, self.on_event)
        if self.detach:
            return {stage.id: Outcome(status="submitted") for stage in self.stages}
        return Follow(self.stages, self.store, self.options, self.on_event, self.study, submitted, self.failed).run()


def preflight(stages: Sequence[Stage], options: SlurmOptions) -> None:
    """Raises ConfigError for what the cluster would refuse, before anything is written or queued."""
    from zexp.config.errors import ConfigError
    from zexp.study import ranks
    from zexp.study.launch.slurm import check, cluster, submit

    cluster.require()
    theirs = sorted(name for name in os.environ if name.startswith(cluster.SBATCH) and name != cluster.ACCOUNT)
    if theirs:
        print(f"Warning: {', '.join(theirs)} in the environment: not used for jobs. What they ask for: hydra.launcher.", file=sys.stderr)
    shapes = submit.shapes_of(stages, options)
    blind = [stage for stage in stages if stage.request.get("device") == "cuda" and not shapes[stage.id].gpus_per_node]
    if blind:
        raise ConfigError(
            f"execution.device = cuda, but hydra.launcher asks for no GPU for {len(blind)} of {len(stages)} stages.\n"
            "  Set hydra.launcher.gpus_per_node=1 (hydra.launcher.train.gpus_per_node, hydra.launcher.eval.gpus_per_node)."
        )
    few = [
        stage
        for stage in stages
        if 0 < shapes[stage.id].gpus_per_node < ranks.count(stage.request) // shapes[stage.id].nodes
    ]
    if few:
        wanted = ranks.count(few[0].request) // shapes[few[0].id].nodes
        raise ConfigError(
            f"hydra.launcher.gpus_per_node = {shapes[few[0].id].gpus_per_node}, but {wanted} ranks of parallelism.data share a node, "
            f"and each has a GPU of its own.\n  Set hydra.launcher.train.gpus_per_node={wanted}."
        )
    there = check.check(list(dict.fromkeys(shapes.values())))
    asked = {shape.gpus_per_node for id, shape in shapes.items() if shape.kind == "train"}
    if asked == {0} and any(one.gpus for one in there) and any(s.request.get("device") == "auto" for s in stages):
        print("Warning: the cluster has GPUs, and no training asks for one: hydra.launcher.gpus_per_node=1 does.", file=sys.stderr)
