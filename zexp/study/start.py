"""What a plan lacks, on its way: on the slots of this machine, in the background, or as jobs of a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zexp.store.folder import Store
from zexp.study import plan as plans
from zexp.study.launch import detach, driver
from zexp.study.outlook import DATA_KINDS, Outlook

if TYPE_CHECKING:
    from zexp.study.launch import LauncherOptions


@dataclass(frozen=True)
class How:
    """words: of the command line, behind the verb; directory: what relative paths are relative to; detached: the command does not
    wait; in_batches: what is run next depends on results; unchanged: the study was recorded before with the same variants; failed: outcomes of stages that failed or diverged in
    an earlier batch of this sweep, which are not tried again.
    """

    words: tuple[str, ...]
    directory: Path
    detached: bool = False
    in_batches: bool = False
    unchanged: bool = False
    failed: Mapping[str, Any] = field(default_factory=dict)


def options(launcher: Mapping[str, Any], plan: plans.Plan, *, patient: bool) -> LauncherOptions:
    """The launcher's options out of the node hydra.launcher, checked, with what the stages ask of this machine or cluster,
    before anything is written. patient: a cluster that does not answer is asked again for some minutes. Raises ConfigError."""
    from zexp.study.dispatch import to_launch
    from zexp.study.launch import check_machine, options_of
    from zexp.study.launch.slurm import SlurmOptions, cluster, preflight

    found = options_of(launcher)
    if isinstance(found, SlurmOptions):
        stages = [to_launch(stage, 0.0) for stage in plan.to_do]
        if patient:
            cluster.patiently(lambda: preflight(stages, found))
        else:
            preflight(stages, found)
    else:
        check_machine([stage.request for stage in plan.to_do], found)
    return found


def fetch(plan: plans.Plan, store: Store, options: LauncherOptions) -> None:
    """What jobs cannot load where they run. Raises ConfigError if that does not work."""
    from zexp.study import hub
    from zexp.study.launch.slurm import SlurmOptions

    if isinstance(options, SlurmOptions) and options.offline:
        hub.fetch(hub.to_fetch(plan, store), store)


def start(plan: plans.Plan, study: str, store: Store, ahead: Outlook, how: How) -> dict[str, Any]:
    """Run, or submit, what is to do; how each stage ended, by id."""
    if how.detached and (ahead.options.backend == "local" or how.in_batches):
        return _in_background(plan, study, store, how)
    if ahead.options.backend != "local":
        return _submit(plan, study, store, ahead, how)
    with driver.driving(store, study, ["run", *how.words]):
        return _run(plan, store, ahead, how.failed)


def _in_background(plan: plans.Plan, name: str, store: Store, how: How) -> dict[str, Any]:
    """Start a process that runs the study, unless one does already; every stage is submitted."""
    from zexp.study.launch import Outcome

    found = driver.running(store, name) if how.unchanged else None
    if found is not None:
        print(f"{name} runs already, since {found['time']}: process {found['pid']} on {found['host']}. Nothing was started.")
        if not driver.is_here(found):
            print(f"If that one is gone, with its machine: rm {store.study(name)}/driver*.json")
    else:
        print(detach.how_to_come_back(store, name, detach.start(store, name, how.words, how.directory)))
    return {stage.id: Outcome(status="submitted") for stage in plan.to_do}


def _submit(plan: plans.Plan, study: str, store: Store, ahead: Outlook, how: How) -> dict[str, Any]:
    """All stages as jobs at once. Whether the supplies suffice the jobs themselves look: nobody may be there to do it."""
    from zexp.study import gate
    from zexp.study.dispatch import run_stages
    from zexp.study.launch.slurm.follow import come_back

    outcomes = run_stages(
        [stage for stage in plan.to_do if stage.id not in how.failed],
        store,
        ahead.options,
        ahead.costs,
        before=how.failed,
        study=study,
        gate=gate.questions(plan, store),
        detach=how.detached,
    )
    if how.detached:
        print(come_back(store, study))
    return outcomes


def _run(plan: plans.Plan, store: Store, ahead: Outlook, failed: Mapping[str, Any]) -> dict[str, Any]:
    """Data first, then, with the exact supplies known, training and evaluation."""
    from zexp.study.dispatch import run_stages

    outcomes: dict[str, Any] = {}
    data = [stage for stage in plan.to_do if stage.kind in DATA_KINDS and stage.id not in failed]
    rest = [stage for stage in plan.to_do if stage.kind not in DATA_KINDS and stage.id not in failed]
    if data:
        outcomes |= run_stages(data, store, ahead.options, ahead.costs, before=failed)
        if any(outcome.status == "interrupted" for outcome in outcomes.values()):
            return outcomes
        plans.check_sources(plan, store)  # only the built corpus knows exactly; nothing has been trained yet
    if rest:
        outcomes |= run_stages(rest, store, ahead.options, ahead.costs, before={**failed, **outcomes})
    return outcomes
