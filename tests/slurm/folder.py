"""A user's folder with a small study, and zexp as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SLURM = ["hydra/launcher=slurm", "hydra.launcher.poll_seconds=1", "hydra.launcher.signal_delay_s=20"]
SLOW = ["+hydra.launcher.handlers={segment:'tests.slurm.slow:run'}"]
STUDY = """\
# @package _global_
defaults:
  - override /arch: mine
  - override /corpus: mine
  - override /mix: mine
  - override /eval: none
study:
  arms:
{arms}
  seeds: [0]
seq_len: 64
phases: {{pretrain: {{tokens: 2K, batch_tokens: 128}}}}
schedule: {{kind: constant, warmup_tokens: 256, decay: null, decay_shape: null, floor_fraction: null}}
anneal: {{tokens: {tokens}, warmup_tokens: 256}}
execution: {{log_every: 1, micro_batch: 2}}
checkpoint: {{every_seconds: 3, keep: {{ladder: false}}}}
hydra: {{mode: MULTIRUN}}
"""


class Folder:
    """zexp init, with studies of arms that fork one short pretraining."""

    def __init__(self, path: Path, *, step_seconds: float = 0.0) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path / "mine"
        self.store = self.path / "store"
        self.environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "140",
            "SLOW_STEP_SECONDS": str(step_seconds),
        }  # fmt: skip
        done = subprocess.run([*self.command("init", "mine")], cwd=path, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        arch = self.path / "conf/arch/mine.yaml"
        arch.write_text(arch.read_text().replace("width: 64", "width: 32"))

    def study(self, name: str, arms: dict[str, list[str]], tokens: int = 1024) -> None:
        lines = "\n".join(f"    {arm}: {json.dumps(overrides)}" for arm, overrides in arms.items())
        (self.path / f"conf/sweeps/{name}.yaml").write_text(STUDY.format(arms=lines, tokens=tokens))

    @staticmethod
    def command(*words: str) -> list[str]:
        return [sys.executable, "-m", "zexp.cli", *words]

    def zexp(self, *words: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words), cwd=self.path, env=self.environment, capture_output=True, text=True, timeout=seconds
        )

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*words), cwd=self.path, env=self.environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def stages(self, *words: str) -> list[dict[str, Any]]:
        """The plan's."""
        done = self.zexp("plan", "--json", *words)
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)["stages"]
        return found

    def anneals(self, *words: str) -> dict[str, Path]:
        """Arm -> the folder of its anneal."""
        return {
            stage["variants"][0].split(",")[0]: self.store / stage["folder"]
            for stage in self.stages(*words)
            if stage["phase"] == "anneal" and stage["kind"] == "segment"
        }

    def status(self, study: str) -> dict[str, dict[str, Any]]:
        """Stage id -> what status says."""
        done = self.zexp("status", "--json", study)
        assert done.returncode == 0, done.stderr
        return {stage["id"]: stage for stage in json.loads(done.stdout)["studies"][study]}

    def attempts(self, stage: Path) -> list[Path]:
        return sorted((stage / "attempts").glob("*"), key=lambda path: int(path.name))

    def steps(self, stage: Path) -> list[list[dict[str, Any]]]:
        """The optimizer steps of each attempt, as its metrics.jsonl has them."""
        return [
            [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
            for path in self.attempts(stage)
            if (path / "metrics.jsonl").exists()
        ]


def wait_for(what: Callable[[], Any], seconds: float = 90.0, why: str = "waited in vain") -> Any:
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, why
        time.sleep(0.1)
    return value


def newest_state(stage: Path) -> int | None:
    tokens = [int(path.name) for path in (stage / "states").glob("*") if (path / "manifest.json").is_file()]
    return max(tokens, default=None)


def weights(stage: Path) -> dict[str, bytes]:
    """The tensors of the newest state, by name."""
    from safetensors.torch import load_file

    tokens = newest_state(stage)
    assert tokens is not None, f"{stage} has no state"
    files: Iterator[Path] = (stage / "states" / str(tokens) / "weights").glob("*.safetensors")
    return {name: tensor.numpy().tobytes() for file in files for name, tensor in load_file(file).items()}
