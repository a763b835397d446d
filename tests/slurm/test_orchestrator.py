"""Studies on a cluster: detached and followed, cancelled and gone on with, two at once, refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import polars
import pytest

from tests.slurm.cluster import NODES, Cluster
from tests.slurm.folder import ROOT, SLOW, SLURM, Folder, newest_state, wait_for, weights

ACTS = ["+hydra.launcher.handlers={segment:'tests.slurm.acts:run'}"]


def done_all(folder: Folder, study: str) -> bool:
    return {stage["status"] for stage in folder.status(study).values()} == {"done"}


def jobs(cluster: Cluster) -> list[str]:
    return cluster.run("squeue", "-h", "-o", "%i").split()


def test_a_detached_study_gives_what_a_local_one_gives_to_the_bit(cluster: Cluster, tmp_path: Path) -> None:
    arms = {"low": ["anneal.peak_fraction=0.5"], "high": ["anneal.peak_fraction=1.0"]}
    away, here = Folder(tmp_path / "away"), Folder(tmp_path / "here")
    for folder in (away, here):
        folder.study("both", arms)
    words = ["run", "+sweeps=both", "eval=bpb"]
    began = time.monotonic()
    submitted = away.zexp(*words, *SLURM, "detach=true")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "zexp status both --watch" in submitted.stdout and "zexp cancel both" in submitted.stdout
    assert time.monotonic() - began < 60
    wait_for(lambda: done_all(away, "both"), 120)
    local = here.zexp(*words)
    assert local.returncode == 0, local.stdout + local.stderr
    assert set(away.status("both")) == set(here.status("both")), "the ids of all stages"
    for arm, stage in away.anneals("+sweeps=both", "eval=bpb").items():
        there = here.store / "trajectory" / stage.name
        assert weights(stage) == weights(there), arm
        assert [s["loss"] for s in away.steps(stage)[0]] == [s["loss"] for s in here.steps(there)[0]]
    again = away.zexp(*words, *SLURM)
    assert again.returncode == 0 and "Nothing to train" in again.stdout
    # Detached, nobody was there to drop the optimizer of the scored ends; the next command does.
    assert not list(away.store.glob("studies/both/submissions/2"))


def test_what_the_cluster_would_refuse_is_refused_before_anything_is_queued(cluster: Cluster, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.study("wrong", {"one": []})
    for words, said in (
        (["hydra.launcher.partition=gpuu"], "no partition gpuu. There are: brief, high, main"),
        (["hydra.launcher.train.gpus_per_node=3"], "no node of main has more than 2"),
        (["hydra.launcher.partition=brief", "hydra.launcher.timeout_min=30"], "brief allows 10 minutes"),
        (["+hydra.launcher.additional_parameters.reservation=nobodys"], "reservation"),
        (["execution.device=cuda"], "asks for no GPU"),
    ):
        done = folder.zexp("run", "+sweeps=wrong", *SLURM, *words)
        assert done.returncode == 2 and said in done.stderr, done.stdout + done.stderr
    assert not jobs(cluster) and not list(folder.store.glob("*/*/attempts"))
    folder.environment["PATH"] = str(Path(sys.executable).parent)
    done = folder.zexp("run", "+sweeps=wrong", *SLURM)
    assert done.returncode == 2 and "not on the path" in done.stderr


def test_ctrl_c_leaves_the_jobs_and_the_same_command_follows_them_again(cluster: Cluster, tmp_path: Path) -> None:
    folder = Folder(tmp_path, step_seconds=0.2)
    folder.study("left", {"one": ["anneal.peak_fraction=0.5"], "two": ["anneal.peak_fraction=0.6"]}, 4096)
    words = ["run", "+sweeps=left", *SLURM, *SLOW]
    process = folder.start(*words)
    stages = folder.anneals("+sweeps=left")
    wait_for(lambda: any(folder.attempts(stage) for stage in stages.values()))
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "The jobs go on" in said, said
    assert len(jobs(cluster)) == 2
    shown = folder.zexp("status", "left").stdout
    assert "running" in shown and "RUNNING on node" in shown
    again = folder.zexp(*words)
    assert again.returncode == 0 and "in the queue already" in again.stdout, again.stdout + again.stderr
    assert all(len(folder.attempts(stage)) == 1 for stage in stages.values()), "nothing was submitted twice"


def test_cancelled_studies_say_so_and_go_on_later(cluster: Cluster, tmp_path: Path) -> None:
    folder = Folder(tmp_path, step_seconds=0.2)
    folder.study("stopped", {"one": ["anneal.peak_fraction=0.5"], "two": ["anneal.peak_fraction=0.6"]}, 12_800)
    words = ["run", "+sweeps=stopped", *SLURM, *SLOW]
    assert folder.zexp(*words, "detach=true").returncode == 0
    stages = folder.anneals("+sweeps=stopped")
    wait_for(lambda: all(newest_state(stage) for stage in stages.values()))
    one = stages["one"].name
    assert "Cancelled 1 job" in folder.zexp("cancel", one[:8]).stdout
    wait_for(lambda: len(jobs(cluster)) == 1, 30)
    assert "Cancelled 1 job" in folder.zexp("cancel", "stopped").stdout
    wait_for(lambda: not jobs(cluster), 30)
    ends = [stage for stage in folder.status("stopped").values() if stage["label"].endswith("anneal")]
    assert all(end["status"] == "missing" and "CANCELLED" in end["reason"] for end in ends), ends
    assert "Nothing of stopped runs or waits" in folder.zexp("cancel", "stopped").stdout
    assert "interrupted" in folder.zexp("status", "stopped").stdout
    folder.environment["SLOW_STEP_SECONDS"] = "0"
    assert folder.zexp(*words).returncode == 0
    for stage in stages.values():
        first, second = folder.steps(stage)
        assert first[-1]["step"] == second[0]["step"] - 1, "scancel gives time to write a state"


def test_two_studies_started_together_train_what_they_share_once(cluster: Cluster, tmp_path: Path) -> None:
    folder = Folder(tmp_path, step_seconds=0.1)
    both = {"shared": ["anneal.peak_fraction=0.5"]}
    folder.study("left", {**both, "left": ["anneal.peak_fraction=0.6"]})
    folder.study("right", {**both, "right": ["anneal.peak_fraction=0.7"]})
    started = [folder.start("run", f"+sweeps={name}", *SLURM, *SLOW) for name in ("left", "right")]
    said = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    for name in ("trajectory", "tokenizer", "corpus", "packing"):
        for stage in (folder.store / name).iterdir():
            assert len(list(stage.glob("attempts/*/log"))) == 1, f"{stage} had two owners"
    assert len(list((folder.store / "trajectory").iterdir())) == 4


def test_jobs_run_the_code_that_they_were_submitted_with(cluster: Cluster, tmp_path: Path) -> None:
    code = tmp_path / "code"
    for name in ("zexp", "conf", "evals", "sweeps", "hydra_plugins", "tests"):
        shutil.copytree(ROOT / name, code / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    folder = Folder(tmp_path, step_seconds=0.1)
    folder.environment["PYTHONPATH"] = str(code)
    folder.study("kept", {"one": []}, 12_800)
    assert folder.zexp("run", "+sweeps=kept", *SLURM, *SLOW, "detach=true").returncode == 0
    (stage,) = folder.anneals("+sweeps=kept").values()
    wait_for(lambda: newest_state(stage))
    loop = code / "zexp/train/loop.py"
    loop.write_text("raise RuntimeError('later edits')\n" + loop.read_text())
    (job,) = jobs(cluster)
    cluster.run("scancel", "--signal=USR2", job)
    wait_for(lambda: len(folder.attempts(stage)) == 2, 60)
    wait_for(lambda: newest_state(stage) == 12_800 + 2048, 90)
    (snapshot,) = (folder.store / "code").iterdir()
    assert (snapshot / "git.json").is_file() and "later edits" not in (snapshot / "zexp/train/loop.py").read_text()
    first, second = folder.steps(stage)
    assert first[-1]["step"] == second[0]["step"] - 1, "told by USR2, it wrote a state and went on from there"


def test_failures_are_tried_again_counted_and_stop_the_study_when_asked(cluster: Cluster, tmp_path: Path) -> None:
    folder = Folder(tmp_path, step_seconds=2)
    arms = {name: [f"anneal.peak_fraction={0.5 + 0.01 * n}"] for n, name in enumerate(("shy", "fails", "fails2", "good", "good2"))}
    folder.study("some", arms)
    words = ["run", "+sweeps=some", *SLURM, *ACTS]
    done = folder.zexp(*words, "hydra.launcher.retries=1")
    assert done.returncode == 1, done.stdout + done.stderr
    stages = folder.anneals("+sweeps=some")
    assert {arm: newest_state(stage) is not None for arm, stage in stages.items()} == {
        "shy": True, "fails": False, "fails2": False, "good": True, "good2": True,
    }  # fmt: skip
    reasons = [json.loads((path / "failure.json").read_text())["error"] for path in folder.attempts(stages["fails"])]
    assert reasons == ["RuntimeError: fails anneal cannot go on"] * 2
    assert "(tried 2 times)" in done.stdout
    wait_for(lambda: not jobs(cluster), 30)

    folder.study("strict", {name: [f"anneal.peak_fraction={0.7 + 0.01 * n}"] for n, name in enumerate(arms)})
    done = folder.zexp("run", "+sweeps=strict", *SLURM, *ACTS, "hydra.launcher.max_failures=1", "hydra.launcher.max_parallel=1")
    assert done.returncode == 1
    made = [arm for arm, stage in folder.anneals("+sweeps=strict").items() if newest_state(stage) is not None]
    assert len(made) < 3 and "stopped after 1 failure (hydra.launcher.max_failures)" in done.stdout, done.stdout
    assert not jobs(cluster)


def test_a_job_that_never_comes_further_gives_up_and_says_so(cluster: Cluster, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.study("fruitless", {"preempted": []})
    done = folder.zexp("run", "+sweeps=fruitless", *SLURM, *ACTS, "hydra.launcher.max_fruitless=2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "requeued without having come further" in " ".join(done.stdout.split())
    (stage,) = folder.anneals("+sweeps=fruitless").values()
    assert len(folder.attempts(stage)) == 2, "two starts, and the third gives up"


def test_fifty_stages_cost_one_question_a_poll(cluster: Cluster, tmp_path: Path) -> None:
    folder = Folder(tmp_path, step_seconds=0)
    folder.study("many", {f"a{n:02}": [f"anneal.peak_fraction={0.3 + 0.01 * n}"] for n in range(46)})
    counter = tmp_path / "bin"
    counter.mkdir()
    for name in ("squeue", "sacct", "sbatch", "sinfo", "scontrol", "scancel"):
        real = shutil.which(name)
        (counter / name).write_text(f'#!/bin/sh\necho "$(date +%s.%N) {name} $*" >> {tmp_path}/commands\nexec {real} "$@"\n')
        (counter / name).chmod(0o755)
    folder.environment["PATH"] = f"{counter}:{os.environ['PATH']}"
    poll = 2.0
    words = ["run", "+sweeps=many", *SLURM, *ACTS, "hydra.launcher.train.stages_per_job=8", f"hydra.launcher.poll_seconds={poll}"]
    done = folder.zexp(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = [line.split(maxsplit=2) for line in (tmp_path / "commands").read_text().splitlines()]
    assert len(folder.status("many")) == 50
    asked = [float(when) for when, name, _ in commands if name in ("squeue", "sacct")]
    assert len(asked) >= 3
    # When a command's line is written varies by some hundredths of a second.
    assert all(later - earlier > poll - 0.5 for earlier, later in pairwise(asked)), "more than one question a poll"
    submitted = [words for _, name, words in commands if name == "sbatch" and "--test-only" not in words]
    assert len(submitted) == 3, "data, the pretraining, and one array of the anneals in packs of eight"


def test_a_store_that_nodes_do_not_see_is_said_within_a_minute_and_the_rest_is_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.study("hidden", {"one": [], "two": ["anneal.peak_fraction=0.5"]})
    private = tmp_path / "private"
    private.mkdir()
    # A file system that only this command sees, as a login node's local disk.
    command = folder.command("run", "+sweeps=hidden", *SLURM, "hydra.launcher.visible_seconds=15", f"store={private}/store")
    script = f"mount -t tmpfs none {private} && exec \"$@\""
    began = time.monotonic()
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *command],
        cwd=folder.path, env=folder.environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "unshare failed" not in done.stderr, done.stderr
    assert done.returncode == 1, done.stdout + done.stderr
    assert "do not see the store" in " ".join(done.stdout.split()), done.stdout
    assert time.monotonic() - began < 60
    wait_for(lambda: not jobs(cluster), 20)


def test_a_job_that_nobody_knows_any_more_ends_explained(cluster: Cluster, tmp_path: Path) -> None:
    folder = Folder(tmp_path, step_seconds=0.2)
    folder.study("gone", {"one": []}, 12_800)
    process = folder.start("run", "+sweeps=gone", *SLURM, *SLOW)
    (stage,) = folder.anneals("+sweeps=gone").values()
    wait_for(lambda: newest_state(stage))
    cluster.kill_accounting()
    (job,) = jobs(cluster)
    cluster.kill_controller()
    cluster.kill_jobs()
    for state in (cluster.folder / "state").glob("job_state*"):
        state.unlink()  # a controller that has lost its jobs, and an accounting that is away
    cluster.start_controller()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert f"job {job} is known neither to squeue nor to sacct" in " ".join(said.split()), said
    folder.environment["SLOW_STEP_SECONDS"] = "0"
    wait_for(lambda: all(cluster.node_is_ready(name) for name in NODES))
    again = folder.zexp("run", "+sweeps=gone", *SLURM, *SLOW)
    assert again.returncode == 0, again.stdout + again.stderr


@pytest.mark.parametrize("follow", [True, False], ids=["followed", "plain"])
def test_logs_of_a_running_stage(cluster: Cluster, tmp_path: Path, follow: bool) -> None:
    folder = Folder(tmp_path, step_seconds=0.2)
    folder.study("loud", {"one": []}, 2560)
    assert folder.zexp("run", "+sweeps=loud", *SLURM, *SLOW, "detach=true").returncode == 0
    (stage,) = folder.anneals("+sweeps=loud").values()
    wait_for(lambda: folder.attempts(stage) and (folder.attempts(stage)[0] / "log").exists())
    done = folder.zexp("logs", *(["-f"] if follow else []), stage.name, seconds=90)
    assert done.returncode == 0 and "Training from 2048 to 4608 tokens" in done.stdout, done.stderr
    assert ("state at 4608 tokens" in done.stdout) is follow
    wait_for(lambda: newest_state(stage) == 4608)


AT_HOME = {"MASTER_ADDR": "127.0.0.1"}  # the names of these nodes are nobody's
NODES_2 = ["parallelism.nodes=2", "parallelism.data=2", "parallelism.timeout_seconds=30"]


def test_two_nodes_train_one_stage(cluster: Cluster, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.study("wide", {"one": []})
    folder.environment |= AT_HOME
    done = folder.zexp("run", "+sweeps=wide", *SLURM, *NODES_2)
    assert done.returncode == 0, done.stdout + done.stderr
    (stage,) = folder.anneals("+sweeps=wide").values()
    state = json.loads((stage / "states/3072/state.json").read_text())
    assert [one["layout"] for one in state["fingerprint_details"].values()] == ["data 2, nodes 2"], state
    # The accounting is some seconds late.
    wait_for(lambda: cluster.run("sacct", "-n", "-X", "-P", "-o", "NNodes,State").split().count("2|COMPLETED") == 2)
    alone = Folder(tmp_path / "alone")
    alone.study("wide", {"one": []})
    assert alone.zexp("run", "+sweeps=wide").returncode == 0
    (there,) = alone.anneals("+sweeps=wide").values()
    losses = [[step["loss"] for step in one.steps(path)[0]] for one, path in ((folder, stage), (alone, there))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # sums in another order, as tests/train/test_ranks.py argues


def test_a_dead_rank_ends_the_stage_quickly_with_its_reason(cluster: Cluster, tmp_path: Path) -> None:
    folder = Folder(tmp_path, step_seconds=0.2)
    folder.study("torn", {"one": []}, 12_800)
    folder.environment |= AT_HOME
    process = folder.start("run", "+sweeps=torn", *SLURM, *SLOW, *NODES_2)
    (stage,) = folder.anneals("+sweeps=torn").values()
    wait_for(lambda: newest_state(stage))
    other = [pid for pid in cluster.processes("node2") if b"SLURM_PROCID=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    began = time.monotonic()
    os.kill(max(other), signal.SIGKILL)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 1 and time.monotonic() - began < 60, said
    assert "Rank 1" in said and "ended without a word" in said, said
    wait_for(lambda: not jobs(cluster), 30)


def test_what_a_task_loads_from_the_hub_is_there_for_nodes_that_may_not_ask_it(cluster: Cluster, tmp_path: Path) -> None:
    from tests.study.test_hub import YAML

    polars.DataFrame({"question": [f"is {n} a number?" for n in range(8)]}).write_parquet(tmp_path / "test.parquet")
    folder = Folder(tmp_path)
    folder.environment.pop("HF_HOME", None)
    folder.study("far", {"one": []})
    (folder.path / "evals").mkdir()
    (folder.path / "evals/far.yaml").write_text(YAML.format(path=tmp_path / "away"))
    (tmp_path / "away/data").mkdir(parents=True)
    (tmp_path / "test.parquet").rename(tmp_path / "away/data/test-0.parquet")
    done = folder.zexp("run", "+sweeps=far", "eval.tasks=[far]", *SLURM)
    assert done.returncode == 0 and "Fetching the data of far" in done.stdout, done.stdout + done.stderr
    (script,) = {path.read_text().split("HF_HOME=")[1].split()[0] for path in folder.store.glob("studies/far/submissions/1/slurm/*.sh")}
    assert script == str(folder.store / "hub")
