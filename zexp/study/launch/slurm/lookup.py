"""Which jobs stand behind a study's stages now, for whoever looks at it: status, cancel, the follower.

What the scheduler says of a job that is over is noted beside the submission (jobs.json): it forgets them after minutes.
"""

from __future__ import annotations

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
    """The newest job of a stage. said: what the scheduler says of it, None if nothing is known; failure: why the stage failed,
    as the job itself says."""

    id: str
    submission: Submission
    said: Queued | None
    failure: str | None = None

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
    """(study -> stage -> its newest job, whether the scheduler was asked in vain): at most one question for all studies."""
    found: dict[str, dict[str, StageJob]] = {}
    known = {study: submission.of_study(store, study) for study in studies}
    known = {study: [one for one in sent if (one.folder / submission.RECORD).is_file()] for study, sent in known.items()}
    open_studies = [study for study, sent in known.items() if any(not one.over for one in sent)]
    queued = cluster.queue({submission.job_name(store, study) for study in open_studies}) if open_studies else {}
    for study, sent in known.items():
        stages = found.setdefault(study, {})
        for one in sent:
            notes = read_notes(one)
            jobs = one.jobs()
            now = {} if one.over else {id: job for id in jobs if (job := cluster.said_of(id, queued or {})) is not None}
            said = notes | now
            note(one, now)
            if queued is not None and not one.over and all(id not in said or said[id].over for id in jobs):
                one.end()
            for id, unit in one.units().items():
                for stage in jobs[id]:
                    told = one.said(unit, stage)
                    failure = told["error"] if told is not None and told["result"] == "failed" else None
                    stages[stage] = StageJob(id, one, said.get(id), failure)
    return found, queued is None


def note(one: Submission, jobs: Mapping[str, Queued]) -> None:
    """Keep what the scheduler says of jobs that are over."""
    before = read_notes(one)
    over = {id: job for id, job in jobs.items() if job.over}
    if any(before.get(id) != job for id, job in over.items()):
        files.write_json(one.folder / NOTES, {id: asdict(job) for id, job in {**before, **over}.items()})


def read_notes(one: Submission) -> dict[str, Queued]:
    try:
        noted = files.read_json(one.folder / NOTES)
    except FileNotFoundError:
        return {}
    return {id: Queued(**job) for id, job in noted.items()}
