"""Which jobs stand behind a study's stages now, for whoever looks at it: status, cancel, the follower.

What the scheduler says of a job that is over is noted beside the submission (jobs.json): it forgets them after minutes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from zexp.store import files
from zexp.store.folder import Store
from zexp.study.launch.slurm import cluster, submission
from zexp.study.launch.slurm.cluster import Queued
from zexp.study.launch.slurm.submission import Submission

NOTES = "jobs.json"


@dataclass(frozen=True)
class StageJob:
    """The newest job of a stage. said: what the scheduler says of it, None if nothing is known; ended: how the stage ended, as
    the job itself says (failed, skipped …), None as long as it works at it or waits; why: the reason."""

    id: str
    submission: Submission
    said: Queued | None
    ended: str | None = None
    why: str | None = None

    @property
    def waits(self) -> bool:
        """It is in the queue or runs, and has not said how the stage ended."""
        return self.said is not None and not self.said.over and self.ended is None

    def line(self) -> str:
        """`job 12_3 RUNNING on node2`."""
        if self.said is None:
            return f"job {self.id}"
        where = f" on {self.said.node}" if self.said.node and not self.said.over else ""
        why = f" ({self.said.reason})" if self.said.reason and self.said.state in ("PENDING", "CANCELLED", "FAILED") else ""
        return f"job {self.id} {self.said.state}{where}{why}"

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "submission": self.submission.number} | ({} if self.said is None else asdict(self.said))


def jobs_of(store: Store, studies: Iterable[str]) -> tuple[dict[str, dict[str, StageJob]], bool]:
    """(study -> stage -> its newest job, whether the scheduler was asked in vain): one question for all studies, and one to the
    accounting if squeue has forgotten jobs whose end nobody has noted."""
    found: dict[str, dict[str, StageJob]] = {}
    known = {study: submission.of_study(store, study) for study in studies}
    # Read before the question: a job that is recorded later is not missed by it.
    open_ones = [one for sent in known.values() for one in sent if not one.over]
    reasons = {one.folder: one.stopped for sent in known.values() for one in sent}
    listed = {one.folder: (one.jobs(), one.units()) for sent in known.values() for one in sent}
    queued = cluster.queue({one.name for one in open_ones}) if open_ones else {}
    notes = {one.folder: read_notes(one) for sent in known.values() for one in sent}
    if queued is not None:
        queued = {**_forgotten([(listed[one.folder][0], notes[one.folder]) for one in open_ones], queued), **queued}
    for study, sent in known.items():
        stages = found.setdefault(study, {})
        for one in sent:
            jobs, units = listed[one.folder]
            now = {} if one.over else cluster.about(jobs, queued or {})
            said = notes[one.folder] | now
            note(one, now)
            if queued is not None and not one.over:
                with contextlib.suppress(PermissionError):
                    one.end_if_over(said)
            for id, unit in units.items():
                for stage in jobs[id]:
                    told, scheduler = one.said(unit, stage), said.get(id)
                    if told is not None and told["final"]:
                        stages[stage] = StageJob(id, one, scheduler, told["result"], told["error"])
                    elif scheduler is not None and scheduler.state == "CANCELLED" and reasons[one.folder] is not None:
                        stages[stage] = StageJob(id, one, scheduler, "skipped", reasons[one.folder])
                    else:
                        stages[stage] = StageJob(id, one, scheduler)
    return found, queued is None


def _forgotten(sent: Iterable[tuple[Iterable[str], Mapping[str, Queued]]], queued: Mapping[str, Queued]) -> dict[str, Queued]:
    """What the accounting says of jobs that are neither in squeue's answer nor noted. sent: the jobs of submissions, their notes."""
    lost = [id for jobs, notes in sent for id in set(jobs) - notes.keys() - cluster.about(jobs, queued).keys()]
    return (cluster.ended(lost) or {}) if lost else {}


def live_jobs(one: Submission, queued: Mapping[str, Queued]) -> dict[str, list[str]]:
    """Job id -> the ids of its stages, of the jobs that wait or run as an answer of cluster.queue() says."""
    jobs = one.jobs()
    return {id: jobs[id] for id, job in cluster.about(jobs, queued).items() if not job.over}


def note(one: Submission, jobs: Mapping[str, Queued]) -> None:
    """Keep what the scheduler says of jobs that are over."""
    before = read_notes(one)
    over = {id: job for id, job in jobs.items() if job.over}
    if any(before.get(id) != job for id, job in over.items()):
        with contextlib.suppress(PermissionError):  # somebody else's, looked at
            files.write_json(one.folder / NOTES, {id: asdict(job) for id, job in {**before, **over}.items()})


def read_notes(one: Submission) -> dict[str, Queued]:
    try:
        noted = files.read_json(one.folder / NOTES)
    except FileNotFoundError:
        return {}
    return {id: Queued(**job) for id, job in noted.items()}
