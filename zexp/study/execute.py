"""What the verbs do with composed configs: plan them, run what is missing, report."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from zexp.config.errors import ConfigError
from zexp.store import retention
from zexp.store.folder import Store
from zexp.study import nearest, record, start
from zexp.study import plan as plans
from zexp.study.launch import detach
from zexp.study.outlook import Outlook, outlook
from zexp.study.resolve import Composed, Resolver, Variant
from zexp.study.variants import study_name

if TYPE_CHECKING:
    from zexp.study.trials import Trials

__all__ = ["Acted", "Composed", "Request", "act", "completed", "planned"]


@dataclass(frozen=True)
class Request:
    """Where and how. launcher: the node hydra.launcher; directory: what relative paths are relative to; words: of the
    command line, behind the verb.

    on_start: called once the request is found right, before anything runs; trials: the sweep whose batches grow one study.
    """

    launcher: dict[str, Any]
    directory: Path
    words: tuple[str, ...] = ()
    on_start: Callable[[], None] | None = None
    trials: Trials | None = None


@dataclass(frozen=True)
class Acted:
    """What came of a run: one JobReturn for each composed config, in order, the plan, and how its stages ended.

    outcomes: by stage id; empty if everything was in the store. detached: the command did not wait for the end; here: the
    stages ran on this machine, and ended with this command.
    """

    job_returns: list[JobReturn]
    plan: plans.Plan
    study: dict[str, Any]
    store: Store
    outcomes: dict[str, Any]
    detached: bool = False
    here: bool = True


class StageFailed(RuntimeError):
    """A variant has no score because a stage of it failed; the text says which."""


def act(composed: list[Composed], request: Request) -> Acted:
    """Plan the composed configs, run what is missing. Raises ConfigError before anything has started if they are wrong.

    With `detach` another process, or jobs, run it, and every stage is `submitted`.
    """
    plan, study, store, variants = planned(composed, request)
    detached = any(one.config.detach for one in composed)
    ahead = _ahead(request, plan, store, study)
    for text in [] if ahead is None else ahead.warnings():
        print(f"Warning: {text}", file=sys.stderr)
    for text in [] if ahead is None else nearest.lines([one for one in ahead.nearest if one.expected], most=1):
        print(text)
    if request.on_start is not None:
        request.on_start()
    trials = request.trials
    change = record.record(study["name"], study, plan, store, grown=trials is not None and trials.name is not None)
    if trials is not None:
        trials.name = study["name"]
    line = change.line(study["name"])
    if line is not None:
        print(line)
    _create(plan, store)
    if plans.mark(plan, store):  # another study may have changed the store before our pins stood
        ahead = _ahead(request, plan, store, study)
        _create(plan, store)
    failed = trials.failed if trials is not None else {}
    outcomes: dict[str, Any] = {}
    if ahead is not None:
        in_batches = trials is not None and trials.in_batches
        how = start.How(request.words, request.directory, detached, in_batches, change.none, failed)
        outcomes = start.start(plan, study["name"], store, ahead, how)
    failed |= {id: outcome for id, outcome in outcomes.items() if outcome.status in ("failed", "diverged")}
    _drop_optimizers(plan, store)
    worst = _worst(study["metric"], trials.direction if trials is not None else None, plan, store)
    returns = _job_returns(composed, variants, plan, study, store, worst)
    here = ahead is None or ahead.options.backend == "local"
    return Acted(returns, plan, study, store, outcomes, detached, here)


def planned(composed: list[Composed], request: Request) -> tuple[plans.Plan, dict[str, Any], Store, list[Variant]]:
    """The plan of the composed configs with their study and store; starts nothing. Raises ConfigError."""
    store = _store(composed)
    variants = Resolver(store.root, request.directory, request.launcher.get("backend", "local")).variants(composed)
    plan = plans.build(variants, store)
    plans.check_sources(plan, store)
    study = _study(composed, variants, request.trials)
    _check_metric(study, variants)
    return plan, study, store, variants


def _store(composed: list[Composed]) -> Store:
    roots = sorted({str(one.config.store) for one in composed})
    if len(roots) > 1:
        raise ConfigError(f"store: the variants name {len(roots)} stores ({', '.join(roots)}). A study has one.")
    store = Store(Path(roots[0]))
    store.check_writable()
    return store


def _study(composed: list[Composed], variants: list[Variant], trials: Trials | None = None) -> dict[str, Any]:
    """The composed `study` node with its name settled."""
    study = OmegaConf.to_container(composed[0].config.study, resolve=True)
    assert isinstance(study, dict)
    said = {str(key): value for key, value in study.items()}
    if said["name"] is None:
        said["name"] = composed[0].choices.get("sweeps") or (trials.name if trials is not None else None)
    ends = [segment.id for variant in variants for segment in variant.chain.segments]
    digest = hashlib.sha256("\n".join(ends).encode()).hexdigest()
    said_words = {word for one in composed for word in one.overrides if not detach.is_key(word)}
    typed = sorted(said_words) if len(composed) == 1 and trials is None else []
    axes = sorted({key for one in composed for key in one.axes})
    said["name"] = study_name(said, typed or axes, digest)
    return said


def _check_metric(study: dict[str, Any], variants: list[Variant]) -> None:
    """study.metric and study.baseline must name what the variants have."""
    problems = []
    metric = study["metric"]
    known = sorted({f"{e.task}/{name}" for v in variants for e in v.evals for name in e.metrics or ()})
    if metric is not None and known and metric not in known and metric.split("/")[0] not in _open_ended(variants):
        problems.append(f"study.metric = {metric!r} is scored by no task of eval.tasks. There are: {', '.join(known)}.")
    for key, value in study["baseline"].items():
        values = {str(variant.axes.get(key)) for variant in variants if key in variant.axes}
        if not values:
            axes = sorted({axis for variant in variants for axis in variant.axes})
            problems.append(f"study.baseline names {key!r}, which is no axis. The axes: {', '.join(axes) or 'none'}.")
        elif str(value) not in values:
            problems.append(f"study.baseline.{key} = {value!r} is no value of that axis: {', '.join(sorted(values))}.")
    if problems:
        raise ConfigError(problems)


def _open_ended(variants: list[Variant]) -> set[str]:
    """Tasks of lm-eval's own, whose metrics are known only when they have run."""
    return {e.task for v in variants for e in v.evals if e.metrics is None}


def _create(plan: plans.Plan, store: Store) -> None:
    """The folders of what is to do, and pins: what this study forks or scores is kept, whoever trains it."""
    if plan.to_do:
        from zexp.store.provenance import provenance

        facts = provenance()
        for stage in plan.to_do:
            kind = "trajectory" if stage.kind == "segment" else stage.kind
            store.folder(kind, stage.full_id).create(stage.semantic, facts)
    forked = plan.forked()
    for stage in plan.stages.values():
        if stage.kind == "segment":
            folder = store.folder("trajectory", stage.full_id)
            if folder.path.exists():
                assert stage.to is not None
                wanted = [v.run.checkpoint.keep.ends for v in plan.variants if v.name in stage.variants]
                folder.pin(stage.to, optimizer=stage.id in forked or "all" in wanted)


def _drop_optimizers(plan: plans.Plan, store: Store) -> None:
    """Of an end that is scored the weights stay, unless a study forks it or keeps it whole (a pin, see _create)."""
    evals = plan.evals_of()
    for stage in plan.scored_ends():
        if all(store.folder("eval", one.full_id).result is not None for one in evals[stage.id]):
            assert stage.to is not None
            retention.drop_optimizer(store.folder("trajectory", stage.full_id), stage.to)


def _ahead(request: Request, plan: plans.Plan, store: Store, study: dict[str, Any]) -> Outlook | None:
    """What is known before it runs; what it needs of the hub is fetched. None if nothing is to do; raises ConfigError for what
    cannot run here."""
    if not plan.to_do:
        return None
    later = request.trials is not None and request.trials.name is not None  # a batch of a sweep under way
    ahead = outlook(plan, store, start.options(request.launcher, plan, patient=later), study["name"])
    start.fetch(plan, store, ahead.options)
    return ahead


def _job_returns(
    composed: list[Composed], variants: list[Variant], plan: plans.Plan, study: dict[str, Any], store: Store, worst: float
) -> list[JobReturn]:
    """COMPLETED with the study's metric (None without one; the worst value if it diverged), or FAILED with the reason."""
    returns = []
    for one, variant in zip(composed, variants, strict=True):
        job = JobReturn(overrides=one.overrides, cfg=one.config, status=JobStatus.COMPLETED)
        missing = _missing(variant, plan, store)
        if missing is None:
            job.return_value = _objective(variant, plan, study["metric"], store)
        elif _diverged(variant, plan, store):
            job.return_value = worst if study["metric"] is not None else None
        else:
            job.status = JobStatus.FAILED
            job.return_value = StageFailed(missing)
        returns.append(job)
    return returns


def _diverged(variant: Variant, plan: plans.Plan, store: Store) -> bool:
    """True if a stage of its chain diverged: a result, not a failure."""
    for stage in (plan.stages[id] for id in plan.segments[variant.name]):
        found = store.folder("trajectory", stage.full_id).diverged()
        if found is not None and stage.to is not None and found["tokens"] <= stage.to:
            return True
    return False


def _worst(metric: str | None, direction: str | None, plan: plans.Plan, store: Store) -> float:
    """The value of a variant that diverged: infinity on the side that nobody wants, NaN if nobody says which.

    Optuna 2.10 stores infinities, in memory and in SQLite, and its samplers rank them last. direction: of the sweeper;
    without one the metric's own is looked up among the scores that there are.
    """
    if direction is not None:
        return math.inf if direction == "minimize" else -math.inf
    task, _, name = (metric or "").partition("/")
    for one in (plan.stages[found[task]] for found in plan.evals.values() if task in found):
        result = store.folder("eval", one.full_id).result
        if result is not None:
            metrics = json.loads((result / "results.json").read_text(encoding="utf-8"))["metrics"]
            if name in metrics:
                return -math.inf if metrics[name]["higher_is_better"] else math.inf
    return math.nan


def _missing(variant: Variant, plan: plans.Plan, store: Store) -> str | None:
    for id in plan.evals[variant.name].values():
        if store.folder("eval", plan.stages[id].full_id).result is None:
            return f"{variant.name}: stage {id} ({plan.stages[id].label}) has no result."
    end = plan.stages[plan.segments[variant.name][-1]]
    assert end.to is not None
    if not plan.evals[variant.name] and store.folder("trajectory", end.full_id).state(end.to) is None:
        return f"{variant.name}: stage {end.id} ({end.label}) has no state."
    return None


def _objective(variant: Variant, plan: plans.Plan, metric: str | None, store: Store) -> float | None:
    if metric is None:
        return None
    task, _, name = metric.partition("/")
    id = plan.evals[variant.name].get(task)
    if id is None:
        return None
    result = store.folder("eval", plan.stages[id].full_id).result
    assert result is not None
    metrics = json.loads((result / "results.json").read_text(encoding="utf-8"))["metrics"]
    if name not in metrics:
        print(f"study.metric = {metric!r}: {task} scored {', '.join(sorted(metrics))}.", file=sys.stderr)
        return None
    return float(metrics[name]["value"])


def completed(composed: list[Composed]) -> list[JobReturn]:
    """JobReturns of a verb that only shows."""
    returns = []
    for one in composed:
        job = JobReturn(overrides=one.overrides, cfg=one.config, status=JobStatus.COMPLETED)
        job.return_value = None
        returns.append(job)
    return returns
