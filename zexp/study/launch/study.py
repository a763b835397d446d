"""The stages of a plan, run with the launcher that the config names, in front of a person."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zexp.config.errors import ConfigError
from zexp.store.folder import Store
from zexp.study.launch.base import LauncherOptions, Outcome, Stage, launch

if TYPE_CHECKING:
    from rich.console import Console

    from zexp.study.plan import Stage as PlanStage

# Seconds, for the order of starting and for the bar alone: only their ratios matter.
DATA_SECONDS = {"tokenizer": 15.0, "corpus": 20.0, "packing": 3.0, "tasks": 10.0}
EVAL_SECONDS = 4.0
CORE_FLOPS = 3e10  # a second on one thread: small models in fp32 reach half of a core's matmul
GPU_FLOPS = 2e13


def run_stages(
    stages: Sequence[PlanStage],
    store: Store,
    launcher: Mapping[str, Any],
    *,
    before: Mapping[str, Outcome] | None = None,
    console: Console | None = None,
) -> dict[str, Outcome]:
    """Run a plan's stages and show how it goes; how each ended, by stage id.

    launcher: the node hydra.launcher without its _target_. before: outcomes of earlier stages, whose failures skip what
    depends on them and whose interruption stops everything. Raises ConfigError if the options are wrong.
    """
    options = options_of(launcher)
    before = before or {}
    if any(outcome.status == "interrupted" for outcome in before.values()):
        return {stage.id: Outcome(status="interrupted") for stage in stages}
    skipped = _skipped(stages, before)
    todo = [launchable(stage) for stage in stages if stage.id not in skipped]
    if not todo:
        return skipped
    from zexp.study.launch.progress import Progress

    with Progress(todo, console) as progress:
        return skipped | launch(todo, store, options, progress)


def options_of(launcher: Mapping[str, Any]) -> LauncherOptions:
    """Raises ConfigError for keys that the launcher does not have and for values that it cannot take."""
    known = {one.name: one for one in dataclasses.fields(LauncherOptions)}
    settable = [name for name in known if name not in ("preload", "handlers")]
    unknown = [key for key in launcher if key not in known]
    if unknown:
        raise ConfigError(
            [f"hydra.launcher.{key}: there is no such key. There are: {', '.join(settable)}." for key in unknown]
        )
    options = LauncherOptions(**{str(key): value for key, value in launcher.items()})
    options.check()
    return options


def launchable(stage: PlanStage) -> Stage:
    """A plan's stage as launchers take it, with the seconds that it is expected to take."""
    return Stage(
        id=stage.id,
        kind=stage.kind,
        folder=stage.folder,
        parents=stage.parents,
        request=stage.request,
        phase=stage.phase,
        label=stage.label,
        cost=_seconds(stage),
    )


def _seconds(stage: PlanStage) -> float:
    if stage.kind != "segment":
        return DATA_SECONDS.get(stage.kind, EVAL_SECONDS)
    rate = GPU_FLOPS if stage.request["device"] == "cuda" else CORE_FLOPS * stage.request["threads"]
    return stage.to_train * stage.flops_per_token / rate


def _skipped(stages: Sequence[PlanStage], before: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """Stages (parents first) of which an ancestor has not become done before."""
    lost = {id for id, outcome in before.items() if outcome.status != "done"}
    skipped: dict[str, Outcome] = {}
    for stage in stages:
        parent = next((parent for parent in stage.parents if parent in lost), None)
        if parent is not None:
            lost.add(stage.id)
            skipped[stage.id] = Outcome(status="skipped", error=f"{parent} is not done")
    return skipped
