"""What status says of a stage, from what its folder and its job say."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from zexp import running
from zexp.report.status import folder_of, read_stages
from zexp.store.folder import StageFolder, Store
from zexp.store.ids import semantic_id
from zexp.study.launch.slurm.cluster import Queued
from zexp.study.launch.slurm.lookup import StageJob
from zexp.study.launch.slurm.submission import Submission


@pytest.fixture
def folder(tmp_path: Path) -> StageFolder:
    folder = Store(tmp_path).folder("corpus", semantic_id({"a": 1}))
    folder.create({"a": 1}, {})
    return folder


def said(folder: StageFolder, job: StageJob | None = None) -> tuple[str, str]:
    name = folder.path.name
    planned = {"id": name, "kind": "corpus", "folder": f"corpus/{name}", "parents": []}
    stage = read_stages(folder.store, [planned])[name]
    about = running._stage(folder_of(folder.store, stage), stage, job)
    return about["status"], about["reason"]


def job(state: str, ended: str | None = None, why: str | None = None) -> StageJob:
    return StageJob("7_0", Submission("study", Path("submissions/1")), Queued(state, "", "node3"), ended, why)


def test_a_failure_is_shown_although_the_process_that_it_befell_still_holds_the_lease(folder: StageFolder) -> None:
    """A process that was killed on another machine releases nothing."""
    attempt = folder.attempt({})
    assert attempt is not None
    held = folder.path / f"lease.{attempt.n}"
    held.write_text(json.dumps({**json.loads(held.read_text()), "boot": "another", "host": "node3"}))
    assert said(folder)[0] == "running"
    record = folder.last_attempt()
    assert record is not None
    record.record_failure("job 7_0 ran out of memory")
    assert said(folder) == ("failed", "job 7_0 ran out of memory")


def test_nothing_runs_that_has_been_silent_for_minutes(folder: StageFolder) -> None:
    attempt = folder.attempt({})
    assert attempt is not None
    held = folder.path / f"lease.{attempt.n}"
    held.write_text(json.dumps({**json.loads(held.read_text()), "boot": "another"}))
    os.utime(held, (time.time() - 3600,) * 2)
    assert said(folder) == ("missing", "interrupted")
    assert said(folder, job("NODE_FAIL")) == ("missing", "interrupted: job 7_0 NODE_FAIL")


@pytest.mark.parametrize("ended", ["failed", "skipped"])
def test_what_a_job_said_of_a_stage_that_it_never_began_is_shown(folder: StageFolder, ended: str) -> None:
    assert said(folder, job("PENDING")) == ("waiting", "not started")
    assert said(folder, job("RUNNING", ended, "stopped after 1 failure")) == (ended, "stopped after 1 failure")
