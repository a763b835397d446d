"""Who drives a study, and how another terminal finds and stops it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from zexp.store.folder import Store
from zexp.store.process import process, this_process
from zexp.study.launch import driver


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def other():
    """Another process, which lives until it is killed."""
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield started
    started.kill()
    started.wait()


def read(store):
    return json.loads((store.study("mine") / "driver.json").read_text())


def test_a_study_is_driven_from_its_record_to_its_end(store):
    assert driver.running(store, "mine") is None
    with driver.driving(store, "mine", ["run", "study.question=why not"]):
        found = driver.running(store, "mine")
        assert found == read(store)
        assert found["command"] == "zexp run 'study.question=why not'"
        assert found["pid"] == this_process()["pid"] and found["log"] is None
        assert driver.is_here(found)
    driver.ended(store, "mine", exit_code=1)
    assert driver.running(store, "mine") is None
    assert read(store)["exit_code"] == 1


def test_an_exception_ends_it_too(store):
    with pytest.raises(ValueError), driver.driving(store, "mine", ["run"]):
        raise ValueError("no")
    assert driver.running(store, "mine") is None
    assert read(store)["error"] == "ValueError: no"


def test_a_study_that_this_process_never_drove_is_left_as_it_is(store, other):
    driver.ended(store, "mine", exit_code=0)
    assert not store.study("mine").exists()
    driver.record(store, "mine", ["run"], process=process(other.pid))
    driver.ended(store, "mine", exit_code=0)
    assert driver.running(store, "mine")["pid"] == other.pid


def test_a_dead_process_drives_nothing(store, other):
    driver.record(store, "mine", ["run"], process=process(other.pid))
    assert driver.running(store, "mine")["pid"] == other.pid
    other.kill()
    other.wait()
    assert driver.running(store, "mine") is None
    assert driver.stop(store, "mine") is False


def test_a_process_of_before_the_reboot_drives_nothing(store):
    driver.record(store, "mine", ["run"], process={**this_process(), "boot": "another"})
    assert driver.running(store, "mine") is None


def test_a_process_of_another_machine_counts_as_running_and_gets_no_signal(store, other):
    driver.record(store, "mine", ["run"], process={**process(other.pid), "host": "far", "boot": "another"})
    found = driver.running(store, "mine")
    assert found["host"] == "far" and not driver.is_here(found)
    assert driver.stop(store, "mine") is False
    assert other.poll() is None


def test_stopping_sends_the_signal_that_has_stages_write_a_state(store, other):
    driver.record(store, "mine", ["run"], process=process(other.pid))
    assert driver.stop(store, "mine") is True
    assert other.wait(10) == -signal.SIGTERM


def test_a_recycled_pid_gets_no_signal(store, other):
    driver.record(store, "mine", ["run"], process={**process(other.pid), "started": "1"})
    assert driver.running(store, "mine") is None
    assert driver.stop(store, "mine") is False
    assert other.poll() is None


def test_two_drivers_of_one_study_are_both_stopped(store, other):
    second = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        driver.record(store, "mine", ["run"], process=process(other.pid))
        driver.record(store, "mine", ["run"], process=process(second.pid))
        assert read(store)["pid"] == other.pid
        assert driver.stop(store, "mine") is True
        assert {other.wait(10), second.wait(10)} == {-signal.SIGTERM}
    finally:
        second.kill()
        second.wait()


def test_a_second_driver_leaves_no_record_of_its_own(store, other):
    driver.record(store, "mine", ["run"], process=process(other.pid))
    with driver.driving(store, "mine", ["run"]):
        assert len(list(store.study("mine").iterdir())) == 2
    driver.ended(store, "mine", exit_code=0)
    assert driver.running(store, "mine")["pid"] == other.pid
    assert len(list(store.study("mine").iterdir())) == 1


def test_what_its_parent_noted_of_it_stays(store):
    log = store.study("mine") / driver.LOG
    driver.record(store, "mine", ["run", "detach=false"], process=this_process(), log=log)
    with driver.driving(store, "mine", ["run", "detach=false"]):
        assert driver.running(store, "mine")["log"] == str(log)
