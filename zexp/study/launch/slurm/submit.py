"""Stages into the queue: which of them somebody has in hand already, the units and arrays of the rest, one sbatch an array."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zexp.config.errors import ConfigError
from zexp.store import files, lease
from zexp.store.folder import Store
from zexp.study import snapshot
from zexp.study.launch import environment
from zexp.study.launch.base import Event, OnEvent, Stage
from zexp.study.launch.slurm import cluster, lookup, submission
from zexp.study.launch.slurm.options import CLASSES, Shape, SlurmOptions, environment_lines, shape_of
from zexp.study.launch.slurm.queue import Array, Unit, arrays_of, asks_for_success, units_of
from zexp.study.launch.slurm.submission import Submission

if TYPE_CHECKING:
    from submitit import SlurmExecutor

# What the libraries of a job read before they ask the network.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "offline"}


@dataclass(frozen=True)
class InHand:
    """What live jobs of earlier submissions work on: stage id -> job ids; and the study's own ones among them."""

    own: dict[str, list[str]] = field(default_factory=dict)
    others: dict[str, list[str]] = field(default_factory=dict)
    submissions: tuple[Submission, ...] = ()  # the study's own with live jobs


def shapes_of(stages: Sequence[Stage], options: SlurmOptions) -> dict[str, Shape]:
    """By stage id."""
    return {stage.id: shape_of(stage, options) for stage in stages}


def submit(
    stages: Sequence[Stage],
    store: Store,
    options: SlurmOptions,
    study: str,
    gate: Mapping[str, Any] | None,
    failed: int,
    on_event: OnEvent,
) -> list[Submission]:
    """Submit what no live job of the study has in hand; all submissions of the study with live jobs, the new one last.

    failed: how many stages of the study have failed in earlier batches of its sweep.
    Two commands on one store submit one after the other, so that the second sees what the first one has queued.
    Raises ConfigError if the cluster refuses; what was queued by then is cancelled.
    """
    turn = lease.acquire(store.root / "submitting", store.lease_times)
    assert turn is not None
    turn.start()
    try:
        held = cluster.patiently(lambda: in_hand(store, study))
        going = _going_on(stages, held)
        rest = [stage for stage in stages if stage.id not in going]
        if not rest:
            on_event(Event(kind="slot", text="All of it is in the queue already."))
            return list(held.submissions)
        return [*held.submissions, _submit(rest, stages, store, options, study, gate, failed, held, on_event)]
    finally:
        turn.release()


def _going_on(stages: Sequence[Stage], held: InHand) -> set[str]:
    """Of the stages that jobs of the study have in hand those whose parents are, too: the job of another one may be waiting for
    a parent that has failed, and is about to be cancelled."""
    ids = {stage.id for stage in stages}
    going: set[str] = set()
    for stage in stages:
        if stage.id in held.own and all(parent in going for parent in stage.parents if parent in ids):
            going.add(stage.id)
    return going


def in_hand(store: Store, study: str) -> InHand:
    """One question to the scheduler about all submissions of the store that may have jobs; a stage that its job has failed at is
    in nobody's hands. Raises ConfigError if it does not answer: submitting blindly would queue stages twice."""
    known = list(submission.open_ones(store))
    if not known:
        return InHand()
    queued = cluster.queue({one.name for one in known})
    if queued is None:
        raise cluster.NoAnswer("SLURM's controller does not answer, so what is queued already is unknown. Nothing was submitted.")
    own: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    live: list[Submission] = []
    for one in known:
        jobs = lookup.live_jobs(one, queued)
        with contextlib.suppress(PermissionError):
            one.end_if_over(lookup.read_notes(one) | cluster.about(one.jobs(), queued))
        if one.study == study and jobs:
            live.append(one)
        units = one.units()
        for id, ids in jobs.items():
            for stage in ids:
                told = one.said(units[id], stage)
                if told is not None and told["final"] and told["result"] != "done":
                    continue
                (own if one.study == study else others).setdefault(stage, []).append(id)
    return InHand(own, others, tuple(live))


def _submit(
    rest: Sequence[Stage],
    stages: Sequence[Stage],
    store: Store,
    options: SlurmOptions,
    study: str,
    gate: Mapping[str, Any] | None,
    failed: int,
    held: InHand,
    on_event: OnEvent,
) -> Submission:
    shapes = shapes_of(rest, options)
    behind = {stage.id: frozenset(_behind(stage, held)) for stage in rest}
    units = units_of(rest, shapes, {name: options.resources(name) for name in set(CLASSES.values())}, behind)
    arrays = arrays_of(units, cluster.patiently(cluster.max_array_size))
    code = snapshot.take(store) if options.snapshot else None
    draft = _Draft(submission.new(store, study), store, options, units, arrays, code, failed)
    draft.write_units({stage.id: stage for stage in stages}, gate)
    draft.submit()
    jobs = len(units)
    text = (
        f"Submitted {jobs} job{'s' * (jobs != 1)} in {len(arrays)} array{'s' * (len(arrays) != 1)} for {len(rest)} "
        f"stages ({', '.join(_summary(arrays))})."
    )
    if held.own:
        text += f" {len(held.own)} more are in the queue already."
    on_event(Event(kind="slot", text=text))
    return draft.submission


def _behind(stage: Stage, held: InHand) -> set[str]:
    """Jobs that were there before: of another study at the same stage, of this study at a parent."""
    found = set(held.others.get(stage.id, ()))
    for parent in stage.parents:
        found |= set(held.own.get(parent, ()))
    return found


@dataclass(frozen=True)
class _Draft:
    """A submission in the making. code: the snapshot that its jobs run, None if they run what is installed."""

    submission: Submission
    store: Store
    options: SlurmOptions
    units: Sequence[Unit]
    arrays: Sequence[Array]
    code: Path | None
    failed: int  # stages of the study that have failed before

    def write_units(self, stages: Mapping[str, Stage], gate: Mapping[str, Any] | None) -> None:
        """What each job reads. stages: all of the study, by id."""
        asked = None
        if gate is not None and gate["variants"]:
            asked = self.submission.folder / "gate.json"
            files.write_json(asked, dict(gate))
        options = self.options
        unit_of = {stage.id: unit for unit in self.units for stage in unit.stages}
        for number, unit in enumerate(self.units):
            files.write_json(
                self.submission.unit(number),
                {
                    "store": str(self.store.root),
                    "lease_times": asdict(self.store.lease_times),
                    "gate": None if asked is None else str(asked),
                    "retries": options.retries,
                    "max_failures": options.max_failures,
                    "failed_before": self.failed,
                    "max_fruitless": options.max_fruitless,
                    "max_parallel": options.max_parallel,
                    "grace_seconds": options.grace_seconds,
                    "preload": list(options.preload),
                    "tasks": unit.shape.tasks,
                    "handlers": options.handlers,
                    "stages": [
                        {
                            "request": _moved(stage.full_request(), self.code),
                            "parents": [
                                {
                                    "label": stages[parent].label,
                                    # The job is not woken unless this one has succeeded.
                                    "sure": parent in unit_of and asks_for_success(unit_of[parent], unit.shape),
                                    **_place(stages[parent]),
                                }
                                for parent in stage.parents
                                if parent in stages
                            ],
                        }
                        for stage in unit.stages
                    ],
                },
            )

    def submit(self) -> None:
        """One sbatch an array; the record knows each job as soon as it is queued. Raises ConfigError with sbatch's words, once
        what was queued by then is cancelled."""
        arrays: list[dict[str, Any]] = [
            {"units": list(array.units), "shape": array.shape.line(), "job": None} for array in self.arrays
        ]
        record: dict[str, Any] = {
            "study": self.submission.study,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "uid": os.getuid(),
            "cluster": cluster.name(),
            "name": submission.job_name(self.store, self.submission),
            "code": None if self.code is None else str(self.code),
            "hub": str(self.store.hub),
            "units": {str(number): [stage.id for stage in unit.stages] for number, unit in enumerate(self.units)},
            "arrays": arrays,
        }
        files.write_json(self.submission.folder / submission.RECORD, record)
        try:
            for array, entry in zip(self.arrays, arrays, strict=True):
                entry["dependency"] = self._dependency(array, [other["job"] for other in arrays])
                entry["job"] = self._sbatch(array, record["name"], entry["dependency"])
                files.write_json(self.submission.folder / submission.RECORD, record)
        except BaseException:
            cluster.cancel_named(record["name"])  # one more may be in the queue than sbatch came to say
            raise

    def _dependency(self, array: Array, jobs: Sequence[str | None]) -> str | None:
        """sbatch's --dependency: aftercorr of one array, or the elements and other studies' jobs that all must have ended.
        jobs: of the arrays, as far as they are queued."""
        if array.corresponds is not None:
            return f"aftercorr:{jobs[array.corresponds]}"
        ids = {
            unit: submission.job_id(job, position, len(made.units))
            for made, job in zip(self.arrays, jobs, strict=True)
            if job is not None
            for position, unit in enumerate(made.units)
            if unit in array.waits
        }
        success = sorted(id for unit, id in ids.items() if asks_for_success(self.units[unit], array.shape))
        rest = sorted({*ids.values(), *array.behind} - set(success))
        parts = [":".join([kind, *found]) for kind, found in (("afterok", success), ("afterany", rest)) if found]
        return ",".join(parts) or None

    def _sbatch(self, array: Array, name: str, dependency: str | None) -> str:
        """Submit an array; its job id. Raises ConfigError with sbatch's words."""
        from submitit.core.utils import FailedSubmissionError

        from zexp.study.launch.slurm import job

        executor = self._executor(array, name, dependency)
        paths = [str(self.submission.unit(number)) for number in array.units]
        try:
            with cluster.outside_allocations(account=array.shape.names_account):
                made = executor.map_array(job.run, paths)
        except FailedSubmissionError as error:
            raise ConfigError(f"sbatch refused a job of {array.shape.line()}: {' '.join(str(error).split())}") from error
        return str(made[0].job_id).partition("_")[0]

    def _executor(self, array: Array, name: str, dependency: str | None) -> SlurmExecutor:
        from submitit import SlurmExecutor

        # Jobs requeue themselves (job.py); submitit's own count of timeouts must not end them.
        executor = SlurmExecutor(folder=self.submission.folder / "slurm", max_num_timeout=1_000_000_000)
        threads = max(int(stage.request.get("threads", 1)) for number in array.units for stage in self.units[number].stages)
        variables = environment.of_stages(threads, self.code)
        if self.options.offline:
            variables |= {name: value for name, value in OFFLINE.items() if name != "WANDB_MODE" or name not in os.environ}
            variables["HF_HOME"] = str(self.store.hub)
        srun = [f"--cpus-per-task={array.shape.cpus_per_task}"]  # since 22.05 srun does not take the job's
        if array.shape.tasks > 1:
            # A rank that dies ends the others within seconds, the first of which writes down why: so they are given a moment,
            # and are killed then (instead of --kill-on-bad-exit, at once).
            srun += ["--kill-on-bad-exit=0", "--wait=30"]
        parameters = array.shape.parameters()
        extra = {"kill-on-invalid-dep": "yes", "requeue": True, **parameters.pop("additional_parameters")}
        executor.update_parameters(
            **parameters,
            job_name=name,
            signal_delay_s=self.options.signal_delay_s,
            setup=[*environment_lines(variables), *array.shape.setup],
            srun_args=srun,
            array_parallelism=min(self.options.max_parallel or len(array.units), len(array.units)),
            additional_parameters=extra,
            **({} if dependency is None else {"dependency": dependency}),
        )
        return executor


def _place(stage: Stage) -> dict[str, Any]:
    """What tells whether a stage is done."""
    request = stage.full_request()
    return {key: request[key] for key in ("stage", "kind", "folder", "to", "optimizer") if key in request}


def _moved(request: dict[str, Any], code: Path | None) -> dict[str, Any]:
    """The request with zexp's own files as they are in the snapshot."""
    own = request.get("eval", {})
    if code is None or own.get("yaml") is None:
        return request
    return {**request, "eval": {**own, "yaml": snapshot.moved(own["yaml"], code)}}


def _summary(arrays: Sequence[Array]) -> list[str]:
    """`3 × 1 node, 1 CPU, …` of each shape."""
    counts: dict[str, int] = {}
    for array in arrays:
        counts[array.shape.line()] = counts.get(array.shape.line(), 0) + len(array.units)
    return [f"{count} × {shape}" for shape, count in counts.items()]
