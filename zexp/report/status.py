"""What became of a stage, derived from its folder: nothing in the store says "failed" or "skipped" twice.

done       its result or state is in its place, or a later state of the same trajectory is (the earlier one was dropped);
           or the archive that this store's folder came with says so of the store where it was made
diverged   its trajectory ended before the stage's tokens by diverging
failed     its last attempt left failure.json
skipped    something that it depends on failed or diverged
missing    none of these: not started, interrupted, or running now
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zexp.report.model import STATUSES, Stage
from zexp.store.folder import StageFolder, Store


def read_stages(store: Store, planned: Sequence[Mapping[str, Any]]) -> dict[str, Stage]:
    """Every stage of variants.json with its status, by id, parents first as they were planned."""
    stages: dict[str, Stage] = {}
    for plan in planned:
        stage = Stage(
            id=plan["id"],
            kind=plan["kind"],
            label=plan.get("label") or plan.get("phase") or plan["kind"],
            phase=plan.get("phase"),
            folder=plan["folder"],
            parents=list(plan["parents"]),
            start=plan.get("from"),
            to=plan.get("to"),
            status="missing",
        )
        _look(store, stage, [stages[parent] for parent in stage.parents if parent in stages])
        stages[stage.id] = stage
    return stages


def folder_of(store: Store, stage: Stage) -> StageFolder:
    """Its folder, for looking only: the id is as short as the plan gives it."""
    kind, _, name = stage.folder.partition("/")
    return StageFolder(store, kind, name, store.root / stage.folder)


def worst(statuses: Sequence[str]) -> str:
    return max(statuses, key=STATUSES.index, default="missing")


def stopped_at(chain: Sequence[Stage]) -> Stage | None:
    """The first stage of a chain that is not done. A later one that is done vouches for those before it."""
    stop = None
    for stage in reversed(chain):
        if stage.status == "done":
            break
        stop = stage
    return stop


def _look(store: Store, stage: Stage, parents: Sequence[Stage]) -> None:
    folder = folder_of(store, stage)
    if _is_done(folder, stage):
        stage.status = "done"
        return
    diverged = folder.diverged() if stage.kind == "segment" else None
    attempt = folder.last_attempt()
    if attempt is not None and attempt.log.exists():
        stage.log = attempt.log.relative_to(store.root).as_posix()
    if diverged is not None and stage.to is not None and diverged["tokens"] <= stage.to:
        stage.status = "diverged"
        stage.reason = f"diverged at {diverged['tokens']:,} tokens: {diverged['reason']}"
        return
    blocked = [parent for parent in parents if parent.status in ("failed", "diverged", "skipped")]
    if blocked:
        cause = blocked[0]
        stage.status, stage.log = "skipped", cause.log
        stage.reason = (
            cause.reason if cause.status == "skipped" else f"{cause.label} ({cause.id}) {_past(cause.status)}"
        )
        return
    failure = attempt.failure() if attempt is not None else None
    if failure is not None:
        stage.status, stage.reason, stage.traceback = "failed", failure["error"], failure.get("traceback", "")
        return
    stage.reason = _unfinished(folder, stage)


def _is_done(folder: StageFolder, stage: Stage) -> bool:
    if stage.kind != "segment":
        return folder.reported_result is not None
    assert stage.to is not None
    return any(tokens >= stage.to for tokens in folder.reported())


def _past(status: str) -> str:
    return "failed" if status == "failed" else "diverged"


def _unfinished(folder: StageFolder, stage: Stage) -> str:
    attempt = folder.last_attempt()
    # An attempt at an earlier cut of the same trajectory says nothing about this one.
    if attempt is None or (stage.kind == "segment" and attempt.request().get("to") != stage.to):
        return "not started"
    progress = attempt.progress()
    far = f" at {progress['done']:,} of {progress['total']:,} {progress['unit']}" if progress else ""
    return f"running{far}" if folder.holder() is not None else f"interrupted{far}"
