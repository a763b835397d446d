"""Launchers: they take stages that are missing in the store to where they can run, in the order of their parents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zexp.store.folder import Store
from zexp.study.launch.base import Event, OnEvent, Outcome, Stage, ignore
from zexp.study.launch.capacity import capacity
from zexp.study.launch.options import LauncherOptions, LocalOptions, options_of
from zexp.study.launch.pool import folder as slots_folder

__all__ = ["Event", "LauncherOptions", "LocalOptions", "Outcome", "Stage", "check_machine", "launch", "options_of"]


def check_machine(requests: Sequence[Mapping[str, Any]], options: LauncherOptions) -> None:
    """Raise ConfigError if this machine cannot run stages with these requests; starts nothing."""
    if isinstance(options, LocalOptions):
        capacity(requests, options)
        slots_folder()


def launch(
    stages: Sequence[Stage],
    store: Store,
    options: LauncherOptions,
    on_event: OnEvent = ignore,
    *,
    study: str = "run",
    gate: Mapping[str, Any] | None = None,
    detach: bool = False,
    failed: int = 0,
) -> dict[str, Outcome]:
    """Run the stages, parents first, and answer how each ended, by stage id.

    stages: topologically sorted, none of them in the store, their folders created. Returns when all have ended or were
    given up: a stage that did not become `done` skips its descendants and nothing else. Called twice with the same stages it
    trains nothing twice: the store decides. Raises ConfigError for options that cannot be met, before anything starts.

    local: after Ctrl-C or SIGTERM running stages write a state, and everything unfinished is `interrupted`.
    slurm: Ctrl-C ends the watching, the jobs go on, and everything unfinished is `submitted`; with detach at once.
    failed: how many stages of the study have failed before, for max_failures.
    study: whose stages these are; gate: what zexp.study.gate asks before a training, where nobody stays that could.
    """
    options.check()
    if not stages:
        return {}
    if options.backend == "slurm":
        from zexp.study.launch.slurm import SlurmLaunch, SlurmOptions

        assert isinstance(options, SlurmOptions)
        return SlurmLaunch(stages, store, options, on_event, study, gate, detach, failed).run()
    from zexp.study.launch.local import LocalLaunch

    assert isinstance(options, LocalOptions)
    return LocalLaunch(stages, store, options, on_event, failed).run()
