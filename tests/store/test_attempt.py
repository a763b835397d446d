import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from zexp.store import files
from zexp.store.errors import LeaseLost, StoreError
from zexp.store.folder import Store
from zexp.store.lease import LeaseTimes


def publish(attempt, target="result", **texts):
    scratch = attempt.scratch("new")
    for name, text in texts.items():
        (scratch / name).write_text(text)
    return attempt.publish(scratch, target)


def take_over(folder):
    """What another process does after the timeout, without the wait."""
    (folder.path / "lease.2").write_text('{"released": false, "host": "elsewhere", "pid": 7}')


# Publishing


def test_a_published_result_has_its_checksums_and_verifies(make):
    folder = make()
    with folder.attempt({}) as attempt:
        assert folder.result is None
        assert publish(attempt, results="{}") is True
    assert list(files.read_json(folder.result / "manifest.json")["files"]) == ["results"]
    folder.verify(folder.result)
    os.truncate(folder.result / "results", 1)
    with pytest.raises(StoreError, match="/results has 1 bytes"):
        folder.verify(folder.result)


def test_the_first_result_stays_and_publishing_again_is_a_success_that_says_false(make):
    folder = make()
    for who, first in (("first", True), ("second", False)):
        with folder.attempt({}) as attempt:
            assert publish(attempt, who=who) is first
    assert (folder.result / "who").read_text() == "first"


def test_an_attempt_publishes_several_states_of_a_trajectory(make):
    folder = make("trajectory")
    with folder.attempt({}) as attempt:
        for tokens in (8192, 4096):
            publish(attempt, f"states/{tokens}", tokens=str(tokens))
    assert folder.states() == [4096, 8192]
    assert (folder.state(4096) / "tokens").read_text() == "4096"
    assert folder.state(5) is None


@pytest.mark.parametrize(
    "kind, target",
    [
        ("eval", "states/5"),
        ("eval", "results"),
        ("eval", "../x/result"),
        ("trajectory", "result"),
        ("trajectory", "states/05"),
        ("trajectory", "states/5/x"),
        ("trajectory", "states/last"),
    ],
)
def test_only_the_places_that_a_kind_has_can_be_published(make, kind, target):
    with make(kind).attempt({}) as attempt:
        with pytest.raises(ValueError, match="to publish"):
            publish(attempt, target)
        with pytest.raises(ValueError, match="to publish"):
            attempt.set_aside(target)


def test_a_folder_in_the_way_without_a_manifest_is_an_error_not_a_result(make):
    folder = make()
    (folder.path / "result").mkdir()
    (folder.path / "result" / "notes").write_text("by hand")
    assert folder.result is None
    with pytest.raises(StoreError, match="result is in the way"), folder.attempt({}) as attempt:
        publish(attempt)


def test_who_was_taken_over_publishes_nothing(make):
    folder = make()
    with (
        pytest.raises(LeaseLost, match=r"taken over by lease 2 \(process 7 on elsewhere"),
        folder.attempt({}) as attempt,
    ):
        take_over(folder)
        publish(attempt)
    assert folder.result is None


def test_who_is_taken_over_while_the_files_go_to_disk_publishes_nothing(make, monkeypatch):
    folder = make()
    real = files.sync_tree

    def slow(path):
        real(path)
        take_over(folder)

    monkeypatch.setattr(files, "sync_tree", slow)
    with pytest.raises(LeaseLost), folder.attempt({}) as attempt:
        publish(attempt)
    assert folder.result is None


def test_who_is_stopped_between_the_last_look_and_the_rename_still_publishes_a_whole_folder_or_none(make, monkeypatch):
    folder = make()
    with pytest.raises(LeaseLost), folder.attempt({}) as first:
        real = os.rename

        def stopped(source, target):
            monkeypatch.setattr(os, "rename", real)
            os.truncate(folder.path / "lease.1", 0)
            (folder.path / "lease.1").write_text('{"released": true}')
            with folder.attempt({}):  # clears the first one's temporaries
                real(source, target)

        monkeypatch.setattr(os, "rename", stopped)
        publish(first, who="first")
    assert folder.result is None


def test_a_damaged_state_is_set_aside_and_made_again(make):
    folder = make("trajectory")
    with folder.attempt({}) as attempt:
        publish(attempt, "states/5", weights="good")
    (folder.state(5) / "weights").write_text("bad!")
    with folder.attempt({}) as attempt:
        attempt.set_aside("states/5")
        assert folder.states() == []
        assert publish(attempt, "states/5", weights="good") is True
    folder.verify(folder.state(5))
    (kept,) = folder.last_attempt().path.glob("damaged-states-5-*")
    assert (kept / "weights").read_text() == "bad!"


# Temporaries


def test_scratch_folders_are_new_and_empty_and_inside_the_attempt(make):
    with make().attempt({}) as attempt:
        a, b = attempt.scratch("state"), attempt.scratch("state")
        assert a != b and not list(a.iterdir()) and not list(b.iterdir())
        assert attempt.path in a.parents and attempt.path in b.parents
        for bad in ("", "..", ".hidden", "a/b"):
            with pytest.raises(ValueError, match="plain file name"):
                attempt.scratch(bad)


def test_temporaries_go_with_the_attempt_and_other_folders_in_it_stay(make):
    folder = make()
    with folder.attempt({}) as attempt:
        (attempt.scratch("big") / "x").write_text("1")
        (attempt.path / "wandb").mkdir()
    assert sorted(os.listdir(attempt.path)) == ["request.yaml", "wandb"]


def test_temporaries_of_a_killed_attempt_go_with_the_next_one(make, start):
    folder = make()
    child = start(folder, "with folder().attempt({}) as a: (a.scratch('s') / 'x').write_text('1'); say(1); die()")
    child.read()
    child.wait()
    assert list(folder.attempts()[0].path.glob("tmp/s/x"))
    with folder.attempt({}):
        assert os.listdir(folder.attempts()[0].path) == ["request.yaml"]


# How attempts end


def test_an_exception_is_written_down_with_its_traceback(make):
    folder = make()
    with pytest.raises(ValueError), folder.attempt({}):
        raise ValueError("loss is\nnot a number")
    failure = folder.last_attempt().failure()
    assert set(failure) == {"error", "traceback", "time"}
    assert failure["error"] == "ValueError: loss is\nnot a number"
    assert "test_attempt.py" in failure["traceback"] and "raise ValueError" in failure["traceback"]
    assert folder.holder() is None  # released


@pytest.mark.parametrize("error", [SystemExit(2), MemoryError(), ConnectionError("hub")])
def test_every_other_end_is_a_failure(make, error):
    folder = make()
    with pytest.raises(type(error)), folder.attempt({}):
        raise error
    assert type(error).__name__ in folder.last_attempt().failure()["error"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), GeneratorExit()])
def test_an_interruption_is_no_failure(make, error):
    folder = make()
    with pytest.raises(type(error)), folder.attempt({}):
        raise error
    assert folder.last_attempt().failure() is None
    assert folder.holder() is None


def test_a_lost_lease_is_no_failure_and_is_not_released(make):
    folder = make()
    with pytest.raises(LeaseLost), folder.attempt({}) as attempt:
        take_over(folder)
        time.sleep(0.2)
        attempt.check()
    assert folder.last_attempt().failure() is None
    assert json.loads((folder.path / "lease.1").read_text())["released"] is False


def test_what_goes_wrong_because_the_lease_was_lost_comes_out_as_that(make):
    folder = make()
    with pytest.raises(LeaseLost) as caught, folder.attempt({}) as attempt:
        scratch = attempt.scratch("s")
        take_over(folder)
        shutil.rmtree(scratch)  # by the new holder
        (scratch / "x").write_text("1")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert folder.last_attempt().failure() is None


def test_an_interruption_after_the_lease_was_lost_stays_one(make):
    folder = make()
    with pytest.raises(KeyboardInterrupt), folder.attempt({}):
        take_over(folder)
        raise KeyboardInterrupt


def test_the_next_attempt_after_a_failure_has_the_next_number_and_a_clean_record(make):
    folder = make()
    with pytest.raises(ValueError), folder.attempt({"micro_batch": 8}):
        raise ValueError
    with folder.attempt({"micro_batch": 4}) as attempt:
        assert attempt.n == 2
    assert [(a.n, a.request(), a.failure() is None) for a in folder.attempts()] == [
        (1, {"micro_batch": 8}, False),
        (2, {"micro_batch": 4}, True),
    ]


def test_a_request_that_cannot_be_written_leaves_the_lease_free(make):
    folder = make()
    with pytest.raises(Exception, match="cannot represent"):
        folder.attempt({"bad": object()})
    assert folder.holder() is None


def test_a_launcher_can_say_why_a_process_died_without_a_word(make, start):
    folder = make()
    child = start(folder, "with folder().attempt({}): die()")
    child.wait()
    folder.last_attempt().record_failure("killed by signal 9 (out of memory?)")
    folder.last_attempt().record_failure("another reason")
    assert folder.last_attempt().failure()["error"] == "killed by signal 9 (out of memory?)"


# Divergence


def test_divergence_is_a_result_that_can_be_tried_again(make):
    folder = make("trajectory")
    assert folder.diverged() is None
    with folder.attempt({}) as attempt:
        attempt.forget_divergence()  # nothing to forget
        attempt.diverge(4096, "loss is NaN")
    assert folder.diverged() == {"tokens": 4096, "reason": "loss is NaN"}
    with folder.attempt({"retry_diverged": True}) as attempt:
        attempt.forget_divergence()
    assert folder.diverged() is None
    assert (attempt.path / "retried_diverged.json").exists()


# Progress and metrics


def test_progress_is_written_twice_a_second_at_most_but_always_at_the_end(make, monkeypatch):
    folder = make()
    clock = [100.0]
    with folder.attempt({}) as attempt:
        monkeypatch.setattr(time, "monotonic", lambda: clock[0])
        seen = []
        for done in range(11):
            attempt.progress(done, 10, "tokens", loss=math.nan)
            seen.append(folder.last_attempt().progress()["done"])
            clock[0] += 0.2
        monkeypatch.undo()
    assert seen == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 10]
    last = folder.last_attempt().progress()
    assert (last["total"], last["unit"], last["loss"]) == (10, "tokens", None)


def test_metrics_are_lines_of_strict_json_with_the_time(make):
    folder = make()
    with folder.attempt({}) as attempt:
        assert folder.last_attempt().metrics() == []
        attempt.metric(step=1, loss=2.5, norms={"m": math.inf})
        assert len(folder.last_attempt().metrics()) == 1  # not buffered
        attempt.metric(step=2, loss=math.nan, norms=(math.inf, 1))
    for line in (attempt.path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    first, second = folder.last_attempt().metrics()
    assert first.pop("time") <= second.pop("time")
    assert first == {"step": 1, "loss": 2.5, "norms": {"m": None}}
    assert second == {"step": 2, "loss": None, "norms": [None, 1]}


def test_a_line_that_a_kill_tore_is_left_out(make):
    folder = make()
    with folder.attempt({}) as attempt:
        attempt.metric(step=1)
        with open(attempt.path / "metrics.jsonl", "a") as file:
            file.write('{"step": 2, "lo')
        assert [line["step"] for line in folder.last_attempt().metrics()] == [1]


# Killed anywhere

SWEEP = """
# The child is killed in its k-th call of anything that changes the disk, for every k until it comes through.
NAMES = ["mkdir", "open", "fsync", "replace", "rename", "pwrite", "unlink", "rmdir"]
def one(k):
    calls = 0
    for name in NAMES:
        def counted(*a, real=getattr(os, name), **kw):
            nonlocal calls
            calls += 1
            if calls == k:
                die()
            return real(*a, **kw)
        setattr(os, name, counted)
    stage = folder()
    with stage.attempt({"k": k}) as attempt:
        scratch = attempt.scratch("result")
        (scratch / "sub").mkdir()
        (scratch / "sub" / "data").write_text("whole")
        attempt.progress(1, 1, "files")
        attempt.publish(scratch, "result")
    os._exit(0)

k = 0
results = 0
while True:
    k += 1
    pid = os.fork()
    if pid == 0:
        one(k)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    stage = folder()
    if stage.result is not None:
        stage.verify(stage.result)
        assert (stage.result / "sub" / "data").read_text() == "whole"
        results += 1
    # Whatever it left, the next one gets in at once and makes it whole.
    began = time.monotonic()
    with stage.attempt({}) as attempt:
        assert time.monotonic() - began < 10
        scratch = attempt.scratch("result")
        (scratch / "sub").mkdir()
        (scratch / "sub" / "data").write_text("whole")
        attempt.publish(scratch, "result")
    stage.verify(stage.result)
    os.rename(stage.result, stage.path / f"done-{k}")
    if status == 0:
        break
    assert status == -9, status
say(f"{k} {results}")
"""


def test_an_attempt_killed_at_any_of_its_calls_never_looks_done_when_it_is_not(store, make, start):
    # Killed between creating its lease and writing into it, it is only replaced after the timeout.
    folder = make(in_store=Store(store.root, LeaseTimes(heartbeat=0.5, timeout=2)))
    child = start(folder, SWEEP)
    calls, results = (int(word) for word in child.read().split())
    assert child.wait() == 0
    # It was killed in some calls before the rename and in some after it; the last one came through.
    assert calls > 20 and 1 < results < calls - 10


def test_an_attempt_ends_cleanly_on_ctrl_c(make, start):
    folder = make()
    child = start(folder, "with folder().attempt({}): say(1); time.sleep(60)")
    child.read()
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == -signal.SIGINT
    assert folder.holder() is None and folder.last_attempt().failure() is None


def test_a_heartbeat_does_not_keep_a_process_alive(make, start):
    child = start(make(), "attempt = folder().attempt({}); attempt.__enter__()")
    assert child.wait() == 0


def test_the_store_needs_no_torch():
    code = "import sys, pkgutil, importlib, zexp.store as s\n"
    code += "[importlib.import_module(f'zexp.store.{m.name}') for m in pkgutil.iter_modules(s.__path__)]\n"
    code += "assert not {'torch', 'numpy', 'hydra', 'omegaconf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
