"""What SLURM's commands print, read; and what a cluster would refuse."""

from __future__ import annotations

import math
import os

import pytest

from zexp.config.errors import ConfigError
from zexp.study.launch import options_of
from zexp.study.launch.slurm import cluster
from zexp.study.launch.slurm.check import problems_of
from zexp.study.launch.slurm.cluster import Partition, Queued
from zexp.study.launch.slurm.follow import say_queue
from zexp.study.launch.slurm.options import Shape

MAIN = Partition("main", True, math.inf, 2, 8, 8000, 4)
BRIEF = Partition("brief", False, 10, 0, 4, 4000, 2)


def shape(**changed: object) -> Shape:
    facts = {
        "kind": "train", "partition": None, "nodes": 1, "gpus_per_node": 0, "cpus_per_task": 1, "tasks_per_node": 1,
        "timeout_min": 5, "mem_gb": None, "others": (), "setup": (),
    }  # fmt: skip
    return Shape(**{**facts, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "minutes"),
    [("infinite", math.inf), ("10:00", 10), ("30", 30), ("4:00:00", 240), ("2-00:00:00", 2880), ("1-12:30", 2190), ("0:30", 0.5)],
)
def test_time_limits_are_minutes(said, minutes):
    assert cluster.minutes_of(said) == minutes


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [("gpu:2", 2), ("gpu:a100:4(S:0-1)", 4), ("gpu:a100:4(S:0,1),gpu:h100:2,nvme:1", 6), ("(null)", 0), ("gpu", 1)],
)
def test_gpus_are_counted(gres, gpus):
    assert cluster.gpus_of(gres) == gpus


@pytest.mark.parametrize(
    ("id", "elements"),
    [("12", ["12"]), ("12_3", ["12_3"]), ("12_[0-2,5%4]", ["12_0", "12_1", "12_2", "12_5"]), ("12_[7]", ["12_7"])],
)
def test_elements_that_never_started_are_told_apart(id, elements):
    assert cluster.elements_of(id) == elements


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"partition": "gpuu"}, "no partition gpuu. There are: brief, main"),
        ({"gpus_per_node": 3}, "hydra.launcher.train.gpus_per_node: 3 GPUs a node, but no node of main has more than 2"),
        ({"cpus_per_task": 5, "tasks_per_node": 2}, "10 CPUs a node"),
        ({"mem_gb": 16.0}, "16 GB a node, but no node of main has more than 7.812"),
        ({"partition": "brief", "timeout_min": 11}, "timeout_min = 11: brief allows 10 minutes"),
        ({"nodes": 5}, "parallelism.nodes = 5: main has 4 nodes"),
    ],
)
def test_what_a_cluster_has_not_is_refused(asked, words):
    (problem,) = problems_of([shape(**asked)], [MAIN, BRIEF]).texts
    assert words in problem


def test_what_it_has_is_not_refused_and_everything_wrong_is_named_at_once():
    assert not problems_of([shape(gpus_per_node=2, cpus_per_task=8)], [MAIN, BRIEF]).texts
    assert len(problems_of([shape(gpus_per_node=3, cpus_per_task=9), shape(partition="x")], [MAIN, BRIEF]).texts) == 3
    assert "has no default" in problems_of([shape()], [BRIEF]).texts[0]


def test_every_wrong_option_is_named():
    wrong = {
        "backend": "slurm", "timeout_min": 0, "max_parallel": 0, "setup": "module load cuda", "signal_delay_s": 0,
        "train": {"gpus": 1, "mem_gb": -1}, "eval": {"partition": 3}, "additional_parameters": {"array": "0-3"},
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        options_of(wrong)
    assert len(caught.value.problems) == 8
    with pytest.raises(ConfigError, match="told to stop as it starts"):
        options_of({"backend": "slurm", "timeout_min": 2, "signal_delay_s": 120})


def test_without_slurm_on_the_path_the_user_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"sbatch.*not on the path.*hydra/launcher=local"):
        cluster.require()


def test_a_controller_that_does_not_answer_is_no_empty_queue(monkeypatch, tmp_path):
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert cluster.queue(["zexp-x"]) is None


def test_the_queue_is_said_in_words():
    jobs = [Queued("RUNNING"), *[Queued("PENDING", "Priority")] * 2, Queued("PENDING", "Dependency"), Queued("COMPLETED")]
    assert say_queue(jobs) == "1 job runs, 3 wait (2 Priority, 1 Dependency)"
    assert say_queue([]) == ""


def test_an_allocation_that_the_command_runs_in_is_not_handed_on(monkeypatch):
    for name, value in (("SLURM_MEM_PER_CPU", "4000"), ("SLURM_ARRAY_JOB_ID", "7"), ("SLURM_CONF", "/etc/slurm.conf"), ("SBATCH_ACCOUNT", "lab"), ("SBATCH_PARTITION", "debug")):
        monkeypatch.setenv(name, value)
    with cluster.outside_allocations(account=True):
        assert "SBATCH_ACCOUNT" not in os.environ, "another one was asked for"
    with cluster.outside_allocations(account=False):
        assert "SBATCH_PARTITION" not in os.environ
        assert "SLURM_MEM_PER_CPU" not in os.environ and "SLURM_ARRAY_JOB_ID" not in os.environ
        assert os.environ["SLURM_CONF"] == "/etc/slurm.conf" and os.environ["SBATCH_ACCOUNT"] == "lab"
    assert os.environ["SLURM_ARRAY_JOB_ID"] == "7"


def test_lists_of_elements_that_are_cut_off_say_nothing_of_the_rest():
    assert cluster.elements_of("12_[0,2,4,...]") == ["12_0", "12_2", "12_4"]
    assert cluster.elements_of("12_[1-9:4]") == ["12_1", "12_5", "12_9"]
