"""What was submitted: which job runs which stages. It stands with its study, so that anybody can come back to it.

    store/studies/<name>/submissions/<n>/submission.json    the arrays with their job ids
                                        units/<k>.json      what the job of a unit runs
                                        units/<k>.seen.json how far it was at its last starts (written by the job)
                                        units/<k>.ended.json  how its stages ended, as the job says
                                        stopped.json        why nothing more of it is started (written by a job)
                                        slurm/              submitit's scripts, and the jobs' own output

Nothing here says that a stage is done: the store does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zexp.store import files
from zexp.store.folder import Store
from zexp.study.launch.slurm import cluster

RECORD = "submission.json"
STOPPED = "stopped.json"  # why nothing more of it is started (written by a job)
SETTLED_SECONDS = 600.0
OVER = "over"  # an empty file: no job of the submission is left, nobody has to ask the scheduler about it


@dataclass(frozen=True)
class Submission:
    """One submission of a study."""

    study: str
    folder: Path

    @property
    def name(self) -> str:
        """The name of its jobs."""
        return str(self.record()["name"])

    @property
    def number(self) -> int:
        return int(self.folder.name)

    def record(self) -> dict[str, Any]:
        value: dict[str, Any] = files.read_json(self.folder / RECORD)
        return value

    def unit(self, number: int) -> Path:
        """What the job of a unit reads."""
        return self.folder / "units" / f"{number}.json"

    def jobs(self) -> dict[str, list[str]]:
        """Job id -> the ids of its stages, of all jobs that were submitted."""
        record = self.record()
        return {id: record["units"][str(unit)] for id, unit in self._units(record).items()}

    def units(self) -> dict[str, int]:
        """Job id -> the number of its unit."""
        return self._units(self.record())

    @staticmethod
    def _units(record: Mapping[str, Any]) -> dict[str, int]:
        return {
            job_id(array["job"], place, len(array["units"])): unit
            for array in record["arrays"]
            if array["job"] is not None
            for place, unit in enumerate(array["units"])
        }

    def start(self, unit: int) -> dict[str, Any] | None:
        """What a unit's job noted when it was started last: {job, host, node, pid, starts, …}; None if it never was."""
        try:
            found: dict[str, Any] | None = files.read_json(self.unit(unit).with_suffix(".seen.json"))
        except FileNotFoundError:
            return None
        return found

    def said(self, unit: int, stage: str) -> dict[str, Any] | None:
        """What a unit's job said of one of its stages: {result, error, attempt, tries, final}; None if it has said nothing.
        final: the job will not try it again."""
        try:
            found: dict[str, Any] | None = files.read_json(self.unit(unit).with_suffix(".ended.json"))["stages"].get(stage)
        except FileNotFoundError:
            return None
        return found

    @property
    def stopped(self) -> str | None:
        """Why nothing more of it is started, if so."""
        path = self.folder / STOPPED
        return str(files.read_json(path)["reason"]) if path.is_file() else None

    def stop(self, reason: str) -> None:
        """Nothing more of it is started; its jobs look here first."""
        files.write_json(self.folder / STOPPED, {"reason": reason})

    @property
    def over(self) -> bool:
        return (self.folder / OVER).exists()

    def end_if_over(self, said: Mapping[str, Any]) -> None:
        """Close it if no job of it is left. said: what the scheduler says, or said, of its jobs, by id.

        Only its own user closes it, who sees its jobs, on its own cluster: to others they may be hidden. A job that squeue does
        not know has ended, once sbatch is some minutes ago.
        """
        record = self.record()
        old = time.time() - (self.folder / RECORD).stat().st_mtime > SETTLED_SECONDS
        known = [said.get(id) for id in self.jobs()]
        made = all(array["job"] is not None for array in record["arrays"])
        ended = (old or (made and None not in known)) and all(job is None or job.over for job in known)
        if ended and record["uid"] == os.getuid():
            with contextlib.suppress(cluster.NoAnswer):  # the next look closes it
                if self.elsewhere() is None:
                    (self.folder / OVER).touch()

    def elsewhere(self) -> str | None:
        """The name of the cluster that has its jobs, if it is not the one that is asked here. Raises ConfigError if that one does
        not answer."""
        theirs = str(self.record()["cluster"])
        return None if theirs == cluster.name() else theirs


def new(store: Store, study: str) -> Submission:
    """The study's next submission, its folders made."""
    number = max((int(folder.name) for folder in _folders(store, study)), default=0) + 1
    submission = Submission(study, store.study(study) / "submissions" / str(number))
    (submission.folder / "units").mkdir(parents=True)
    return submission


def of_study(store: Store, study: str) -> list[Submission]:
    """All of a study whose record is written, oldest first."""
    return [Submission(study, folder) for folder in _folders(store, study) if (folder / RECORD).is_file()]


def _folders(store: Store, study: str) -> list[Path]:
    folder = store.study(study) / "submissions"
    try:
        return [folder / name for name in sorted((name for name in os.listdir(folder) if name.isdigit()), key=int)]
    except FileNotFoundError:
        return []


def open_ones(store: Store) -> Iterator[Submission]:
    """Submissions of any study that may still have jobs."""
    studies = store.root / "studies"
    for name in sorted(os.listdir(studies)) if studies.is_dir() else ():
        for one in of_study(store, name):
            if not one.over:
                yield one


def job_name(store: Store, one: Submission) -> str:
    """The name of a submission's jobs: readable, and no other one's (squeue and scancel are asked for jobs by their names)."""
    readable = re.sub(r"[^\w.-]+", "_", one.study)[:40]
    digest = hashlib.sha256(f"{store.root.resolve()}/{one.study}".encode()).hexdigest()[:8]
    return f"zexp-{readable}-{digest}-{one.number}"


def job_id(array: str, place: int, size: int) -> str:
    """Of an element; submitit submits one unit alone as a job without an array."""
    return array if size == 1 else f"{array}_{place}"
