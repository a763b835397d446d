"""All families of sweeps/architectures.yaml are trained and compared, at the scale smoke: minutes on two cores."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.studies

SWEEP = Path(__file__).parents[2] / "sweeps/architectures.yaml"
ARCHS = yaml.safe_load(SWEEP.read_text())["study"]["grid"]["arch"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("architectures")
    words = ["run", "+sweeps=architectures", "scale=smoke", "execution.log_every=1"]
    done = subprocess.run(
        [sys.executable, "-m", "zexp.cli", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def losses(folder: Path, arch: str) -> list[float]:
    """Of every step, from the metrics of the segments of one architecture, in nats a token."""
    record = json.loads((folder / "store/studies/architectures/variants.json").read_text())
    (row,) = (row for row in record["variants"] if row["name"] == arch)
    found = []
    for segment in row["segments"]:
        attempts = sorted((folder / "store/trajectory" / segment.partition("@")[0] / "attempts").iterdir())
        lines = [line for attempt in attempts for line in (attempt / "metrics.jsonl").read_text().splitlines()]
        found += [figures["loss"] for figures in map(json.loads, lines) if "loss" in figures]
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_learns(folder, arch):
    found = losses(folder, arch)
    assert len(found) >= 30
    first, last = sum(found[:5]) / 5, sum(found[-5:]) / 5
    assert last < first and last < math.log(4096)


def test_the_table_compares_them(folder):
    board = json.loads((folder / "store/studies/architectures/report/leaderboard.json").read_text())
    rows = {row["arch"]: row for row in board["rows"]}
    assert set(rows) == set(ARCHS)
    assert all(row["status"] == "done" for row in rows.values())
