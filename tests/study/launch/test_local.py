"""Real slots, real child processes, fake stages."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.study.launch import handlers
from tests.study.launch.tree import HANDLERS, Tree, statuses
from zexp.config.errors import ConfigError
from zexp.study.launch import LocalOptions, launch, machine, progress

ROOT = Path(__file__).parents[3]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # so that slots find these handlers, wherever zexp is installed
    monkeypatch.setattr(machine, "core_numbers", lambda: [0, 1, 2, 3])
    return Tree(tmp_path / "a store's folder")


def wait_for(what: Any, seconds: float = 15.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return value


def alive(pid: int) -> bool:
    """False for a zombie, where /proc can tell: not every container's first process waits for orphans."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc/self").exists()


def test_parents_end_before_their_children_start(tree):
    tree.add("a", seconds=0.1)
    tree.add("b", "a")
    tree.add("c", "a")
    tree.add("d", "b", "c", "in the store already")
    assert set(statuses(tree.launch(slots=2)).values()) == {"done"}
    at = {(line["stage"], line["what"]): line["time"] for line in tree.record()}
    for child, parent in (("b", "a"), ("c", "a"), ("d", "b"), ("d", "c")):
        assert at[parent, "end"] < at[child, "start"]


def test_two_children_never_share_a_slot(tree):
    for n in range(8):
        tree.add(str(n), seconds=0.1)
    tree.launch(slots=2)
    starts, ends = ({line["stage"]: line for line in tree.record(what)} for what in ("start", "end"))
    assert len({line["server"] for line in starts.values()}) == 2
    for one in starts.values():
        for other in starts.values():
            if one["stage"] < other["stage"] and one["server"] == other["server"]:
                apart = ends[one["stage"]]["time"] <= other["time"] or ends[other["stage"]]["time"] <= one["time"]
                assert apart


def test_a_failing_stage_skips_only_its_descendants_and_shows_its_traceback(tree):
    tree.add("good")
    tree.add("bad", act="raise")
    tree.add("below", "bad", "good")
    tree.add("far below", "below")
    tree.add("beside", "good")
    outcomes = tree.launch()
    assert statuses(outcomes) == {
        "good": "done", "bad": "failed", "below": "skipped", "far below": "skipped", "beside": "done",
    }  # fmt: skip
    bad = outcomes["bad"]
    assert "Traceback" in bad.error and bad.error.endswith("RuntimeError: bad cannot go on")
    assert "said by bad" in bad.log.read_text() and "RuntimeError" in bad.log.read_text()
    assert outcomes["below"].error == "stage bad is failed"
    assert sorted(tree.started()) == ["bad", "beside", "good"]


def test_a_killed_child_takes_neither_its_slot_nor_its_siblings(tree):
    tree.add("killed", act="kill")
    tree.add("sibling", seconds=0.3)
    tree.add("next", "sibling")
    tree.add("below", "killed")
    outcomes = tree.launch(slots=1)
    assert statuses(outcomes) == {"killed": "failed", "sibling": "done", "next": "done", "below": "skipped"}
    assert "SIGKILL" in outcomes["killed"].error
    failure = json.loads((outcomes["killed"].log.parent / "failure.json").read_text())
    assert "SIGKILL" in failure["error"]
    assert len({line["server"] for line in tree.record("start")}) == 1


def test_a_killed_server_fails_its_stage_and_another_one_takes_the_slot(tree):
    tree.add("killer", act="kill server", seconds=30)
    tree.add("next")
    tree.add("below", "killer")
    outcomes = tree.launch(slots=1)
    assert statuses(outcomes) == {"killer": "failed", "next": "done", "below": "skipped"}
    assert "slot 0 ended unexpectedly" in outcomes["killer"].error
    assert len({line["server"] for line in tree.record("start")}) == 2
    wait_for(lambda: not alive(tree.record("start")[0]["pid"]))  # told to stop by its lifeline


def test_a_server_that_cannot_start_fails_what_needs_it_after_some_tries(tree):
    tree.add("a", kind="segment")
    tree.add("b", "a", kind="segment")
    outcomes = tree.launch(slots=1, preload=("no_such_module",), start_method="fork")
    assert statuses(outcomes) == {"a": "failed", "b": "skipped"}
    assert "No module named 'no_such_module'" in outcomes["a"].error


def test_a_failed_stage_is_tried_again_when_asked(tree):
    tree.add("shy", act="raise once")
    tree.add("below", "shy")
    outcomes = tree.launch(retries=1)
    assert statuses(outcomes) == {"shy": "done", "below": "done"}
    assert outcomes["shy"].tries == 2
    folder = tree.store.root / tree.stages[0].folder
    assert (folder / "attempts/1/failure.json").exists()


def test_every_try_keeps_its_reason_and_the_last_one_is_told_with_their_number(tree):
    stage = tree.add("hopeless", act="raise")
    outcomes = tree.launch(retries=2)
    assert statuses(outcomes) == {"hopeless": "failed"}
    attempts = [tree.store.root / stage.folder / "attempts" / str(n) for n in (1, 2, 3)]
    assert outcomes["hopeless"].tries == 3 and outcomes["hopeless"].log == attempts[2] / "log"
    for attempt in attempts:
        assert json.loads((attempt / "failure.json").read_text())["error"] == "RuntimeError: hopeless cannot go on"
    retried = [event for event in tree.events if event.kind == "retry"]
    assert [event.attempt for event in retried] == attempts[:2]
    console = Console(file=io.StringIO(), width=200)
    progress.failures(tree.stages, outcomes, console)
    assert "failed stage hopeless (hopeless) (tried 3 times)" in console.file.getvalue()


def test_after_so_many_failures_running_stages_stop_at_a_state_and_the_rest_is_skipped(tree):
    tree.add("bad", act="raise", cost=9)
    tree.add("worse", act="raise while another trains", other="running", cost=8)
    tree.add("running", act="train", seconds=60, cost=7)
    tree.add("below bad", "bad")
    tree.add("below running", "running")
    tree.add("later")
    began = time.monotonic()
    outcomes = tree.launch(slots=2, max_failures=2)
    assert time.monotonic() - began < 30
    why = "stopped after 2 failures (hydra.launcher.max_failures)"
    assert {id: (one.status, one.error if one.status == "skipped" else None) for id, one in outcomes.items()} == {
        "bad": ("failed", None),
        "worse": ("failed", None),
        "running": ("skipped", why),
        "below bad": ("skipped", "stage bad is failed"),
        "below running": ("skipped", why),
        "later": ("skipped", why),
    }
    assert [line["stage"] for line in tree.record("checkpoint")] == ["running"]
    assert "later" not in tree.started()
    (said,) = [event.text for event in tree.events if event.kind == "stopping"]
    assert said.startswith("Stopped after 2 failures (hydra.launcher.max_failures): 1 running stage writes a state")


def test_only_a_failure_after_the_last_try_counts(tree):
    tree.add("shy", act="raise once")
    tree.add("next")
    assert statuses(tree.launch(max_failures=1, retries=1)) == {"shy": "done", "next": "done"}


def test_failures_of_an_earlier_launch_count(tree):
    tree.add("bad", act="raise")
    tree.add("next")
    options = LocalOptions(slots=1, preload=(), handlers=HANDLERS, max_failures=3)
    outcomes = launch(tree.stages, tree.store, options, failed=2)
    assert statuses(outcomes) == {"bad": "failed", "next": "skipped"}
    assert outcomes["next"].error == "stopped after 3 failures (hydra.launcher.max_failures)"


def test_divergence_is_a_result_and_is_not_trained_again(tree):
    tree.add("wild", kind="segment", act="diverge")
    tree.add("score", "wild", kind="eval")
    outcomes = tree.launch(preload=())
    assert statuses(outcomes) == {"wild": "diverged", "score": "skipped"}
    assert outcomes["wild"].error == "diverged after 100 tokens: loss is nan"
    again = tree.launch(preload=())
    assert statuses(again) == {"wild": "diverged", "score": "skipped"}
    assert tree.started() == ["wild"]


def test_a_handler_that_says_done_without_a_result_is_failed(tree):
    tree.add("liar", act="lie")
    assert "nothing is in place" in tree.launch()["liar"].error


def test_a_stage_without_a_folder_is_failed_with_a_reason(tree):
    tree.add("lost", created=False)
    assert "was never created" in tree.launch()["lost"].error


@pytest.mark.skipif(sys.platform == "darwin", reason="slots spawn on macOS")
def test_a_slot_has_imported_torch_before_it_forks_and_its_children_may_use_threads(tree):
    tree.add("a", kind="segment", act="multiply", threads=2)
    tree.add("b", "a", kind="segment", act="multiply", threads=2)
    outcomes = tree.launch(preload=("torch",))
    assert statuses(outcomes) == {"a": "done", "b": "done"}
    assert [line["torch"] for line in tree.record("start")] == [True, True]


@pytest.mark.skipif(sys.platform == "darwin", reason="slots spawn on macOS")
def test_a_warm_slot_does_at_once_what_another_one_is_still_being_started_for(tree, tmp_path, monkeypatch):
    (tmp_path / "slow_import.py").write_text("import time\ntime.sleep(3)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    tree.add("first", kind="segment")
    tree.add("second", "first", kind="segment")
    tree.add("third", "first", kind="segment")
    began = time.monotonic()
    assert set(statuses(tree.launch(slots=2, preload=("slow_import",))).values()) == {"done"}
    ends = {line["stage"]: line for line in tree.record("end")}
    assert len({line["server"] for line in ends.values()}) == 1
    assert ends["third"]["time"] - ends["first"]["time"] < 2.5, f"within {time.monotonic() - began:.1f} s in all"


def test_a_stage_that_is_in_the_store_by_now_is_not_run(tree):
    tree.add("a")
    tree.launch()
    assert statuses(tree.launch()) == {"a": "done"}
    assert tree.started() == ["a"]


def test_evals_of_one_state_run_in_one_process_and_one_failure_takes_no_other(tree):
    tree.add("state", kind="segment")
    for n in range(4):
        tree.add(f"eval{n}", "state", kind="eval", act="raise" if n == 1 else "work")
    outcomes = tree.launch()
    assert statuses(outcomes) == {
        "state": "done", "eval0": "done", "eval1": "failed", "eval2": "done", "eval3": "done",
    }  # fmt: skip
    assert len({line["pid"] for line in tree.record("start") if line["stage"] != "state"}) == 1
    logs = [outcomes[f"eval{n}"].log.read_text() for n in (0, 1, 2, 3)]
    assert [f"said by eval{n}" in logs[n] for n in range(4)] == [True] * 4
    assert "said by eval0" not in logs[1]


def test_a_crash_in_the_middle_of_a_job_costs_only_the_stage_that_crashed(tree):
    tree.add("state", kind="segment")
    for n in range(3):
        tree.add(f"eval{n}", "state", kind="eval", act="kill" if n == 1 else "work")
    outcomes = tree.launch()
    assert statuses(outcomes) == {"state": "done", "eval0": "done", "eval1": "failed", "eval2": "done"}
    assert outcomes["eval2"].tries == 1


def test_children_get_their_threads_and_no_gpu(tree, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    tree.add("a", threads=3)
    tree.launch()
    (line,) = tree.record("start")
    assert line["OMP_NUM_THREADS"] == "3" and line["CUDA_VISIBLE_DEVICES"] == ""


def test_each_slot_gets_one_gpu_of_those_that_are_visible(tree, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-11223344")
    for n in range(4):
        tree.add(str(n), device="auto", seconds=0.3)
    tree.launch(slots=None)
    assert {line["CUDA_VISIBLE_DEVICES"] for line in tree.record("start")} == {"3", "GPU-11223344"}


def test_a_gpu_that_is_not_there_is_refused_before_anything_starts(tree, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tree.add("a", device="cuda")
    with pytest.raises(ConfigError, match="shows no GPU"):
        tree.launch()


def test_spawned_children_do_the_same(tree):
    tree.add("a")
    tree.add("b", "a", act="raise")
    tree.add("c", "a")
    outcomes = tree.launch(start_method="spawn")
    assert statuses(outcomes) == {"a": "done", "b": "failed", "c": "done"}
    assert "said by a" in outcomes["a"].log.read_text()


def test_a_file_in_the_working_directory_does_not_replace_pythons(tree, tmp_path, monkeypatch):
    (tmp_path / "selectors.py").write_text("raise RuntimeError('not that one')")
    monkeypatch.chdir(tmp_path)
    tree.add("a")
    assert statuses(tree.launch()) == {"a": "done"}


def test_nothing_is_left_behind(tree, tmp_path, monkeypatch):
    (tmp_path / "t").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    tree.add("a")
    tree.launch()
    assert list((tmp_path / "t").iterdir()) == []
    (line,) = tree.record("start")
    assert not alive(line["server"]) and not alive(line["pid"])


DRIVER = """
import sys
from pathlib import Path
from tests.study.launch.tree import HANDLERS, Tree, statuses
from zexp.study.launch import machine
machine.core_numbers = lambda: [0, 1]
tree = Tree(Path(sys.argv[1]))
tree.add("a", act=sys.argv[2], seconds=60)
tree.add("b", "a")
tree.add("c", act="work", seconds=60)
print(statuses(tree.launch(slots=2, grace_seconds=float(sys.argv[3]))))
"""


@pytest.fixture
def driver() -> Iterator[Callable[[Path, str, float], subprocess.Popen[str]]]:
    """Starts a process of its own that launches two long stages and one below; returns when both do what they are for.

    A stage that has only started does not hear signals in its own way yet.
    """
    started: list[subprocess.Popen[str]] = []

    def start(root: Path, act: str, grace_seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DRIVER, str(root), act, str(grace_seconds)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment, start_new_session=True
        )
        started.append(process)
        ready = {("a", "training" if act == "train" else act), ("c", "start")}
        wait_for(lambda: ready <= {(line["stage"], line["what"]) for line in handlers.read(root)})
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def gone(root: Path) -> bool:
    return not any(alive(line[who]) for line in handlers.read(root) for who in ("pid", "server"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
def test_an_interruption_lets_stages_write_a_state_and_interrupts_the_rest(tmp_path, driver, number):
    process = driver(tmp_path, "train", 10)
    os.killpg(process.pid, number)  # what a terminal does: the whole foreground group
    said, _ = process.communicate(timeout=15)
    assert said == "{'a': 'interrupted', 'b': 'interrupted', 'c': 'interrupted'}\n"
    assert [line["stage"] for line in handlers.read(tmp_path) if line["what"] == "checkpoint"] == ["a"]
    assert gone(tmp_path)
    assert not list(tmp_path.glob("*/*/attempts/*/failure.json"))


def test_a_stage_that_does_not_stop_is_killed_after_the_grace_period(tmp_path, driver):
    process = driver(tmp_path, "deaf", 0.5)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=15)
    assert "'a': 'interrupted'" in said
    assert gone(tmp_path)


def test_a_second_ctrl_c_does_not_wait(tmp_path, driver):
    process = driver(tmp_path, "deaf", 60)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert gone(tmp_path)


def test_a_killed_driver_leaves_states_and_no_processes(tmp_path, driver):
    process = driver(tmp_path, "train", 10)
    process.kill()
    process.wait()
    wait_for(lambda: gone(tmp_path))
    assert [line["stage"] for line in handlers.read(tmp_path) if line["what"] == "checkpoint"] == ["a"]
