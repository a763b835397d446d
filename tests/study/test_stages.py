"""One stage in this process."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.study.launch.tree import HANDLERS, Tree
from zexp.store.folder import Store
from zexp.store.lease import LeaseTimes
from zexp.study import stages
from zexp.study.stages import Ended, Watcher, run_stage

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def run(tree, stage, **options):
    return run_stage(tree.store.root, stage.full_request(), handlers=HANDLERS, **options)


def test_what_a_stage_prints_is_in_its_log_and_not_here(tree, capfd):
    stage = tree.add("a")
    assert run(tree, stage) == Ended("done")
    assert (tree.store.root / stage.folder / "attempts/1/log").read_text() == "said by a\n"
    assert capfd.readouterr().out == ""
    print("here again")
    assert capfd.readouterr().out == "here again\n"


def test_an_exception_is_one_line_here_and_a_traceback_in_the_log(tree):
    stage = tree.add("a", act="raise")
    assert run(tree, stage) == Ended("failed", "RuntimeError: a cannot go on")
    assert "Traceback" in (tree.store.root / stage.folder / "attempts/1/log").read_text()


def test_a_signal_interrupts_without_a_failure(tree):
    stage = tree.add("a", seconds=20)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert run(tree, stage).result == "interrupted"
    assert not (tree.store.root / stage.folder / "attempts/1/failure.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_diverged_trajectory_is_trained_again_only_when_asked(tree):
    wild = tree.add("a", kind="segment", act="diverge")
    assert run(tree, wild) == Ended("diverged", "diverged after 100 tokens: loss is nan")
    calm = {**wild.full_request(), "act": "work"}
    assert run_stage(tree.store.root, calm, handlers=HANDLERS).result == "diverged"
    assert run_stage(tree.store.root, {**calm, "retry_diverged": True}, handlers=HANDLERS).result == "done"


def test_a_stage_that_ends_before_its_trajectory_diverged_is_run(tree):
    stage = tree.add("a", kind="segment", to=50)
    (folder,) = tree.store.folders("trajectory")
    with folder.attempt({}) as attempt:
        attempt.diverge(100, "loss is nan")
    assert run(tree, stage) == Ended("done")


def test_a_stage_that_somebody_else_has_in_hand_is_waited_for(tree):
    stage = tree.add("a")
    (folder,) = tree.store.folders("corpus")
    holders = []
    with folder.attempt({}) as other:
        waiting = threading.Event()
        said = []
        watcher = Watcher(waiting=lambda holder: (holders.append(holder), waiting.set()))
        thread = threading.Thread(target=lambda: said.append(run(tree, stage, watcher=watcher)))
        thread.start()
        assert waiting.wait(5)
        scratch = other.scratch("result")
        (scratch / "said").write_text("by the other one")
        other.publish(scratch, "result")
    thread.join(5)
    assert said == [Ended("done")]
    assert holders[0]["pid"] == os.getpid()
    assert tree.started() == []


def test_a_stage_taken_over_while_it_slept_is_waited_for(tree, monkeypatch):
    stage = tree.add("a")

    def taken_over(store, folder, request, attempt):
        with _steal(folder) as thief:
            scratch = thief.scratch("result")
            (scratch / "said").write_text("by the thief")
            thief.publish(scratch, "result")
        time.sleep(1.1)  # an attempt looks at its lease once a second
        attempt.check()
        raise AssertionError("went on without the lease")

    monkeypatch.setattr(stages, "_handler", lambda reference: taken_over)
    assert run(tree, stage) == Ended("done")


PAUSED = """
import contextlib, json, sys
from tests.study.launch.tree import HANDLERS
from zexp.store.lease import LeaseTimes
from zexp.study import stages
def pauses(store, folder, request, attempt):
    scratch = attempt.scratch("result")
    (scratch / "said").write_text("by the paused one")
    print("ready", file=sys.__stdout__, flush=True)
    sys.stdin.readline()
    attempt.publish(scratch, "result")
    raise AssertionError("published without the lease")
stages._handler = lambda reference: pauses
stages._output_to = lambda log: contextlib.nullcontext()  # its stdin and stdout are the test's
times = LeaseTimes(heartbeat=0.1, timeout=1.5, poll=0.02)
print(stages.run_stage(sys.argv[1], json.loads(sys.argv[2]), handlers=HANDLERS, times=times), flush=True)
"""


def test_a_paused_process_whose_stage_was_taken_over_publishes_nothing(tree):
    stage = tree.add("a")
    times = LeaseTimes(heartbeat=0.1, timeout=1.5, poll=0.02)
    (folder,) = Store(tree.store.root, times).folders("corpus")
    paused = subprocess.Popen(
        [sys.executable, "-c", PAUSED, str(tree.store.root), json.dumps(stage.full_request())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert paused.stdout.readline() == "ready\n"
        paused.send_signal(signal.SIGSTOP)
        with folder.attempt({}) as second:  # waits for 1.5 silent seconds
            assert second.n == 2
            paused.send_signal(signal.SIGCONT)
            paused.stdin.write("\n")
            paused.stdin.flush()
            time.sleep(1.0)
            assert folder.result is None
            scratch = second.scratch("result")
            (scratch / "said").write_text("by the second")
            assert second.publish(scratch, "result")
        assert paused.communicate(timeout=20)[0] == "Ended(result='done', error=None)\n", "done by the other one"
    finally:
        paused.kill()
        paused.communicate()
    assert (folder.result / "said").read_text() == "by the second"
    assert [attempt.failure() for attempt in folder.attempts()] == [None, None]


def test_a_stage_whose_folder_is_deleted_while_it_runs_is_failed(tree, monkeypatch):
    stage = tree.add("a")

    def deletes(store, folder, request, attempt):
        shutil.rmtree(folder.path)
        time.sleep(1.1)
        attempt.check()
        raise AssertionError("went on without the lease")

    monkeypatch.setattr(stages, "_handler", lambda reference: deletes)
    ended = run(tree, stage)
    assert ended.result == "failed" and "was never created" in ended.error


def _steal(folder):
    """An attempt with a higher lease, as after 30 silent seconds."""
    from zexp.store import lease
    from zexp.store.attempt import Attempt

    taken = lease._create(folder.path, lease.highest(folder.path) + 1, LeaseTimes())
    assert taken is not None
    return Attempt(folder, taken, {})


def test_every_handler_of_the_table_is_there():
    for reference in stages.HANDLERS.values():
        module, _, name = reference.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_the_stage_process_and_the_launcher_import_no_torch():
    code = (
        "import sys, zexp.study.stages, zexp.study.launch.slot, zexp.study.launch.child, zexp.study.launch.local, "
        "zexp.study.launch.progress\n"
        "heavy = {'torch', 'lm_eval', 'datasets', 'submitit'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_what_a_slot_imports_starts_no_thread_and_touches_no_gpu():
    """A fork after a threaded operation hangs."""
    code = (
        "import os, torch, zexp.train.loop\n"
        "assert len(os.listdir('/proc/self/task')) == 1, os.listdir('/proc/self/task')\n"
        "assert not torch.cuda.is_initialized()"
    )
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **threads})


def test_a_second_signal_does_not_hit_the_cleaning_up():
    cleaned = False
    with pytest.raises(stages.Interrupted), stages._interruptible():
        try:
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            cleaned = True
    assert cleaned
