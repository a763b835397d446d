"""Final scores to where a study's curves are: the wandb run of the trajectory whose end was scored.

Sent by the process that runs the study, once a state and set of scores; what was sent stands in studies/<name>/wandb/.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from zexp.store import files
from zexp.store.folder import Store
from zexp.store.ids import short
from zexp.study.plan import Plan, Stage
from zexp.train import logger


def send_scores(plan: Plan, store: Store, study: str) -> list[str]:
    """Send what is new; lines for the user: what could not be sent, and how to send what was written offline."""
    segments = [stage for stage in plan.stages.values() if stage.kind == "segment"]
    logged = [stage for stage in segments if stage.request["logger"]["kind"] == "wandb"]
    if not logged or logger.mode() == "disabled":
        return []
    folder = store.study(study) / "wandb"
    evals = plan.evals_of()
    lines = []
    for stage in sorted(logged, key=lambda stage: stage.to or 0):  # a run's points go forward
        scores = _scores(store, evals.get(stage.id, []))
        options = stage.request["logger"]
        sent = {"scores": scores, "mode": logger.mode(), "project": options["project"], "entity": options["entity"]}
        place = folder / stage.id
        if not scores or ((place / "sent.json").is_file() and files.read_json(place / "sent.json") == sent):
            continue
        assert stage.to is not None
        place.mkdir(parents=True, exist_ok=True)
        try:
            logger.send_scores(options, short(stage.full_id), stage.to, scores, place)
        except logger.NotSent as error:
            lines.append(f"wandb: the scores of {stage.label} were not sent ({error}). The next run tries again.")
        else:
            files.write_json(place / "sent.json", sent)
    return lines + _offline(logged, store, folder)


def _scores(store: Store, evals: list[Stage]) -> dict[str, float]:
    """{task/metric: value} of the evaluations that are done."""
    found: dict[str, float] = {}
    for stage in evals:
        result = store.folder("eval", stage.full_id).result
        if result is not None:
            made = files.read_json(result / "results.json")
            found |= {f"{made['task']}/{name}": metric["value"] for name, metric in made["metrics"].items()}
    return found


def _offline(logged: list[Stage], store: Store, folder: Path) -> list[str]:
    runs = set(logger.offline_runs(folder))
    for stage in logged:
        runs.update(logger.offline_runs(store.root / stage.folder / "attempts"))
    if not runs:
        return []
    command = shlex.join(["wandb", "sync", *map(str, sorted(runs))])
    return [f"wandb: {len(runs)} runs were written offline: {logger.why_offline()}. To send them:\n  {command}"]
