"""One study on a cluster on which everything goes wrong: what is not hit finishes, what is hit ends well or says why, the
same command again completes it, and the weights are those of an undisturbed run to the bit."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.folder import SLOW, SLURM, Folder, newest_state, wait_for, weights

STEP_SECONDS = 0.2
SHORT, LONG = 22_528, 115_200  # tokens: 176 steps are 35 s of sleep, 900 steps are 3 minutes
ARMS = {
    "limited": [f"anneal.tokens={LONG}", "anneal.peak_fraction=0.5"],
    "killed": ["anneal.peak_fraction=0.55"],
    "lost": ["anneal.peak_fraction=0.6"],
    "preempted": ["anneal.peak_fraction=0.65"],
    "blind": ["anneal.peak_fraction=0.7"],
    "cancelled": ["anneal.peak_fraction=0.75"],
    "raises": ["anneal.peak_fraction=0.8"],
    "plain": ["anneal.peak_fraction=0.85"],
}
AWAY_SECONDS = 30.0


class Faults:
    """Does to each arm what its name says, once it has written a state."""

    def __init__(self, cluster: Cluster, stages: dict[str, Path]) -> None:
        self.cluster, self.stages = cluster, stages
        self.done: dict[str, str] = {}
        self.most_running = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Faults:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        waiting = {"killed": self._kill, "lost": self._lose, "preempted": self._preempt, "blind": self._blind, "cancelled": self._cancel}
        while not self._over.wait(0.3):
            running = (self.cluster.ask("squeue", "-h", "-p", "main", "-t", "R", "-o", "%i", seconds=5) or "").split()
            self.most_running = max(self.most_running, len(running))
            for arm, act in list(waiting.items()):
                if arm == "blind" and any(self._job_of(other) for other in waiting if other != arm):
                    continue  # which would be over before the controller is back
                if newest_state(self.stages[arm]) is not None and self._job_of(arm):
                    self.done[arm] = act(arm)
                    del waiting[arm]
                    break

    def _holder(self, arm: str) -> dict[str, str | int]:
        from zexp.store.folder import Store

        stage = self.stages[arm]
        found = Store(stage.parents[1]).find(stage.name, "trajectory")
        return (found[0].holder() if found else None) or {}

    def _job_of(self, arm: str) -> tuple[str, str] | None:
        """(job, node) of the process that trains the arm."""
        pid = self._holder(arm).get("pid")
        try:
            variables = dict(
                part.split("=", 1) for part in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in part
            )
        except OSError:
            return None
        return f"{variables['SLURM_ARRAY_JOB_ID']}_{variables['SLURM_ARRAY_TASK_ID']}", variables["SLURMD_NODENAME"]

    def _kill(self, arm: str) -> str:
        os.kill(int(self._holder(arm)["pid"]), signal.SIGKILL)
        return "killed"

    def _lose(self, arm: str) -> str:
        job = self._job_of(arm)
        assert job is not None
        self.cluster.kill_node(job[1])
        threading.Timer(45, lambda: self.cluster.start_node(job[1])).start()
        return job[1]

    def _preempt(self, arm: str) -> str:
        job = self._job_of(arm)
        assert job is not None
        self.cluster.run("sbatch", "-p", "high", "--exclusive", "-w", job[1], "-o", "/dev/null", "--time=2", "--wrap=sleep 3")
        return job[1]

    def _blind(self, arm: str) -> str:
        self.cluster.kill_controller()
        time.sleep(AWAY_SECONDS)
        self.cluster.start_controller()
        return "the controller was away"

    def _cancel(self, arm: str) -> str:
        job = self._job_of(arm)
        assert job is not None
        self.cluster.run("scancel", job[0])
        return job[0]


def test_everything_goes_wrong_and_nothing_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    folder = Folder(tmp_path, step_seconds=STEP_SECONDS)
    folder.study("faults", ARMS, SHORT)
    words = ["+sweeps=faults", *SLURM, *SLOW, "hydra.launcher.max_parallel=2"]
    # SLURM looks at time limits every 30 s, and warns up to so much earlier.
    words += ["hydra.launcher.train.timeout_min=1", "hydra.launcher.signal_delay_s=5"]
    stages = folder.anneals("+sweeps=faults")
    folder.store.mkdir(exist_ok=True)
    (folder.store / "raise").touch()
    with Faults(cluster, stages) as faults:
        first = folder.zexp("run", *words, seconds=700)
    assert set(faults.done) == {"killed", "lost", "preempted", "blind", "cancelled"}, first.stdout + first.stderr
    assert faults.most_running <= 2
    assert first.returncode == 1, first.stdout + first.stderr
    status = {stage["label"].split()[0]: stage for stage in folder.status("faults").values() if stage["label"].endswith("anneal")}
    ends = {arm: one["status"] for arm, one in status.items()}
    assert ends == {
        "limited": "done", "killed": "failed", "lost": "done", "preempted": "done", "blind": "done",
        "cancelled": "missing", "raises": "failed", "plain": "done",
    }, first.stdout  # fmt: skip
    assert "SIGKILL" in status["killed"]["reason"]
    assert "this arm raises" in status["raises"]["reason"]
    assert "CANCELLED" in status["cancelled"]["reason"]

    (folder.store / "raise").unlink()
    again = folder.zexp("run", *words, seconds=300)
    assert again.returncode == 0, again.stdout + again.stderr

    for arm, stage in stages.items():
        attempts = folder.steps(stage)
        for before, after in itertools.pairwise(attempts):
            # States are 3 s apart, 15 steps at this pace; writing one takes a moment.
            assert 0 <= before[-1]["step"] - (after[0]["step"] - 1) <= 30, f"{arm} was trained twice"
    assert len(folder.steps(stages["limited"])) >= 3, "three minutes do not fit into one allocation of one"
    assert len(folder.steps(stages["plain"])) <= 2

    undisturbed = Folder(tmp_path / "elsewhere")
    undisturbed.study("faults", ARMS, SHORT)
    there = undisturbed.anneals("+sweeps=faults")
    done = undisturbed.zexp("run", "+sweeps=faults")
    assert done.returncode == 0, done.stdout + done.stderr
    for arm, stage in stages.items():
        assert stage.name == there[arm].name
        assert weights(stage) == weights(there[arm]), f"{arm} has other weights than undisturbed"
    wait_for(lambda: not cluster.run("squeue", "-h", "-p", "main").split())
