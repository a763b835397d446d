"""Stages of a plan to the launcher that the config names, with live progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zexp.store.folder import Store
from zexp.study import plan as plans
from zexp.study.launch import LauncherOptions, base, launch, progress


def run_stages(
    stages: Sequence[plans.Stage],
    store: Store,
    options: LauncherOptions,
    costs: Mapping[str, float],
    before: Mapping[str, base.Outcome] | None = None,
    *,
    study: str = "run",
    gate: Mapping[str, Any] | None = None,
    detach: bool = False,
) -> dict[str, base.Outcome]:
    """Run the stages, parents first; how each ended.

    costs: estimated seconds of each, to order them by. before: outcomes of an earlier part of the plan, whose failures
    skip what depends on them here. study, gate, detach: see launch().
    """
    failed = sum(outcome.status == "failed" for outcome in (before or {}).values())
    if options.max_failures is not None and failed >= options.max_failures:
        why = base.stopped_after(failed)
        return {stage.id: base.Outcome(status="skipped", error=why) for stage in stages}
    lost = {id for id, outcome in (before or {}).items() if outcome.status != "done"}
    skipped: dict[str, base.Outcome] = {}
    launched = []
    for stage in stages:
        above = next((parent for parent in stage.parents if parent in lost), None)
        diverged = stage.diverged is not None and not stage.request.get("retry_diverged")
        if above is not None:
            skipped[stage.id] = base.Outcome(status="skipped", error=f"stage {above} did not end well.")
            lost.add(stage.id)
        elif diverged:
            assert stage.diverged is not None
            reason = f"diverged at {stage.diverged['tokens']:,} tokens: {stage.diverged['reason']}"
            skipped[stage.id] = base.Outcome(status="diverged", error=reason)
            lost.add(stage.id)
        else:
            launched.append(to_launch(stage, costs[stage.id]))
    with progress.Progress(launched) as on_event:
        return {
            **skipped,
            **launch(launched, store, options, on_event, study=study, gate=gate, detach=detach, failed=failed),
        }


def to_launch(stage: plans.Stage, cost: float) -> base.Stage:
    """What the launcher needs to know of a stage."""
    return base.Stage(
        id=stage.id,
        kind=stage.kind,
        folder=stage.folder,
        parents=tuple(stage.parents),
        request=stage.request,
        phase=stage.phase,
        label=stage.label,
        cost=cost,
    )
