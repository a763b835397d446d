"""The quickstart study at its smallest scale, as jobs and on this machine: same stages, same figures to the bit."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.folder import SLURM, Folder, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.studies]
WORDS = ["+sweeps=quickstart", "scale=smoke", "execution.log_every=1"]


def figures(root: Path) -> dict[str, list[Any]]:
    """Loss and gradient norm of every optimizer step of every trajectory, and every score, by the folder of its stage."""
    found: dict[str, list[Any]] = {}
    for trajectory in sorted((root / "store/trajectory").iterdir()):
        lines = [line for file in sorted(trajectory.glob("attempts/*/metrics.jsonl")) for line in file.read_text().splitlines()]
        steps = [(step["tokens"], step["loss"], step["grad_norm"]) for step in map(json.loads, lines) if "loss" in step]
        found[trajectory.name] = sorted(set(steps))
    for scores in sorted((root / "store/eval").glob("*/result/results.json")):
        found[scores.parent.parent.name] = [json.loads(scores.read_text())["metrics"]]
    return found


def test_quickstart_detached_on_a_cluster_is_the_local_one(cluster: Cluster, tmp_path: Path) -> None:
    away, here = tmp_path / "away", tmp_path / "here"
    environment = Folder(tmp_path / "unused").environment

    def zexp(folder: Path, *words: str) -> str:
        folder.mkdir(exist_ok=True)
        done = subprocess.run(Folder.command(*words), cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def stages(folder: Path) -> dict[str, str]:
        found = json.loads(zexp(folder, "status", "--json", "quickstart"))["studies"]["quickstart"]
        return {stage["id"]: stage["status"] for stage in found}

    zexp(away, "run", *WORDS, *SLURM, "detach=true")
    wait_for(lambda: set(stages(away).values()) == {"done"}, 600)
    zexp(here, "run", *WORDS)
    assert stages(away) == stages(here)
    ours, theirs = figures(away), figures(here)
    assert len(ours) > 40 and all(ours.values())
    assert ours == theirs
