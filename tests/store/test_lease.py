"""Leases, mostly against real processes: killed, stopped, forked, racing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from zexp.store import lease as leases
from zexp.store.errors import LeaseLost
from zexp.store.folder import Store
from zexp.store.lease import LeaseTimes, acquire, highest, read
from zexp.store.process import known_dead, this_process

HOLD = """
with folder().attempt({}) as attempt:
    say(attempt.n)
    sys.stdin.readline()
"""
SLOW = LeaseTimes(heartbeat=5.0, timeout=30.0, poll=0.02)  # as in production: "at once" means something


def record(folder, n=1, **facts):
    """Write lease n as another process would have."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**this_process(), "beats": 3, "released": False, **facts})
    (folder / f"lease.{n}").write_text(text)


def seconds_to_acquire(folder, times):
    began = time.monotonic()
    taken = acquire(folder, times)
    assert taken is not None
    taken.release()
    return time.monotonic() - began


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# Killed holders


@pytest.mark.parametrize("waited_for", [True, False], ids=["reaped", "zombie"])
def test_a_killed_holder_is_replaced_at_once_on_the_same_boot(store, make, start, waited_for):
    folder = make(in_store=Store(store.root, SLOW))
    child = start(folder, HOLD)
    assert child.read() == "1"
    os.kill(child.pid, signal.SIGKILL)
    if waited_for:
        child.wait()
    else:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended and is a zombie
    assert seconds_to_acquire(folder.path, SLOW) < 5
    assert highest(folder.path) == 2


def test_a_released_lease_is_taken_at_once_and_stays(store, make, start):
    folder = make(in_store=Store(store.root, SLOW))
    child = start(folder, HOLD)
    child.read()
    child.write("")
    assert child.wait() == 0
    assert seconds_to_acquire(folder.path, SLOW) < 5
    assert sorted(os.listdir(folder.path)) == [
        "attempts", "config.yaml", "lease.1", "lease.2", "provenance.json",
    ]  # fmt: skip


def test_a_recycled_pid_is_not_the_holder(tmp_path):
    record(tmp_path, pid=os.getpid(), started="1")
    assert seconds_to_acquire(tmp_path, SLOW) < 5


def test_a_dead_pid_of_this_boot_is_known_dead_and_a_live_one_is_not():
    assert known_dead({**this_process(), "pid": dead_pid()})
    assert not known_dead(this_process())


@pytest.mark.parametrize(
    "other", [{"boot": "another"}, {"boot": None}, {"namespace": "pid:[1]"}, {"pid": None}, {"pid": "12"}]
)
def test_a_pid_of_another_boot_or_container_says_nothing(other):
    assert not known_dead({**this_process(), "pid": dead_pid(), **other})


def test_a_holder_on_another_machine_is_only_known_by_its_heartbeat(tmp_path, store):
    record(tmp_path, boot="another", pid=dead_pid())
    assert seconds_to_acquire(tmp_path, store.lease_times) >= store.lease_times.timeout


def test_an_empty_lease_times_out_like_any_other(tmp_path, store):
    (tmp_path / "lease.1").touch()  # its maker was killed between create and write
    assert seconds_to_acquire(tmp_path, store.lease_times) >= store.lease_times.timeout


def test_a_record_of_another_shape_times_out_like_any_other(tmp_path, store):
    (tmp_path / "lease.1").write_text('["released"]')
    assert seconds_to_acquire(tmp_path, store.lease_times) >= store.lease_times.timeout


# Living and stopped holders


def test_a_holder_that_beats_is_never_taken_over(store, make, start):
    folder = make()
    start(folder, HOLD).read()
    end = time.monotonic() + 3 * store.lease_times.timeout
    assert acquire(folder.path, store.lease_times, done=lambda: time.monotonic() > end) is None
    assert highest(folder.path) == 1


STOPPED = """
with folder().attempt({}) as attempt:
    scratch = attempt.scratch("result")
    (scratch / "who").write_text("stopped")
    say("ready")
    sys.stdin.readline()
    try:
        attempt.publish(scratch, "result")
    except LeaseLost as lost:
        say(f"LeaseLost: {lost}")
        raise
"""


def test_a_stopped_holder_is_taken_over_after_the_timeout_and_then_cannot_publish(store, make, start):
    folder = make()
    child = start(folder, STOPPED)
    child.read()
    os.kill(child.pid, signal.SIGSTOP)
    began = time.monotonic()
    with folder.attempt({}) as attempt:
        assert time.monotonic() - began >= store.lease_times.timeout
        assert attempt.n == 2
        os.kill(child.pid, signal.SIGCONT)
        child.write("")
        assert child.read().startswith(f"LeaseLost: {folder.path}: lease 1 was taken over by lease 2 (process")
        assert child.wait() != 0
        assert folder.result is None
        scratch = attempt.scratch("result")
        (scratch / "who").write_text("second")
        assert attempt.publish(scratch, "result") is True
    assert (folder.result / "who").read_text() == "second"
    assert folder.attempts()[0].failure() is None  # losing the lease is no failure of the stage


def test_beats_of_a_holder_that_was_taken_over_change_nothing(store, make, start):
    folder = make()
    child = start(folder, HOLD)
    child.read()
    os.kill(child.pid, signal.SIGSTOP)
    taken = acquire(folder.path, store.lease_times)
    os.kill(child.pid, signal.SIGCONT)
    time.sleep(5 * store.lease_times.heartbeat)
    taken.check(fresh=True)
    child.write("")
    assert child.wait() != 0  # leaving its with, it learns that it lost the lease
    taken.check(fresh=True)


# Waiting


def test_who_waits_learns_that_the_work_was_done_meanwhile(store, make, start):
    folder = make()
    child = start(
        folder,
        """
with folder().attempt({}) as attempt:
    say("ready")
    sys.stdin.readline()
    attempt.publish(attempt.scratch("result"), "result")
    sys.stdin.readline()
""",
    )
    child.read()
    waits = []

    def on_wait(holder, seconds):
        if not waits:
            child.write("")
        waits.append((holder["pid"], seconds))

    assert folder.attempt({}, done=lambda: folder.result is not None, on_wait=on_wait) is None
    assert {pid for pid, _ in waits} == {child.pid}
    assert [seconds for _, seconds in waits] == sorted(seconds for _, seconds in waits)
    assert len(folder.attempts()) == 1


def test_work_done_between_the_last_look_and_the_taking_is_not_done_again(tmp_path):
    answers = iter([False, True])
    assert acquire(tmp_path, SLOW, done=lambda: next(answers)) is None
    assert read(tmp_path).facts["released"] is True


def test_work_already_done_takes_no_lease(tmp_path):
    assert acquire(tmp_path, SLOW, done=lambda: True) is None
    assert os.listdir(tmp_path) == []


def test_a_waiting_process_can_be_told_to_give_up(tmp_path):
    record(tmp_path)

    class Stop(Exception):
        pass

    def on_wait(holder, seconds):
        raise Stop

    with pytest.raises(Stop):
        acquire(tmp_path, SLOW, on_wait=on_wait)
    assert os.listdir(tmp_path) == ["lease.1"]


def test_a_directory_listing_that_lags_behind_does_not_hide_a_lease(tmp_path, monkeypatch):
    record(tmp_path, 1, released=True)
    record(tmp_path, 2)
    monkeypatch.setattr(leases, "highest", lambda folder: 1)  # an NFS client's cached listing
    calls = []

    def on_wait(holder, seconds):
        calls.append(holder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        acquire(tmp_path, SLOW, on_wait=on_wait)
    assert calls[0]["pid"] == os.getpid()
    assert not (tmp_path / "lease.3").exists()


# Racing

RACE = """
from zexp.store.lease import acquire
work, rounds = Path(sys.argv[5]), int(sys.argv[6])
say("ready")
sys.stdin.readline()
for _ in range(rounds):
    lease = acquire(folder().path, TIMES)
    (work / "inside").mkdir()            # fails if anybody else is inside
    count = int((work / "count").read_text())
    time.sleep(0.002)
    (work / "count").write_text(str(count + 1))
    (work / "inside").rmdir()
    lease.release()
"""


def test_of_racers_exactly_one_holds(tmp_path, store, make, start):
    folder = make(in_store=Store(store.root, LeaseTimes(heartbeat=5, timeout=60, poll=0.001)))
    work = tmp_path / "work"
    work.mkdir()
    (work / "count").write_text("0")
    children = [start(folder, RACE, str(work), "15") for _ in range(3)]
    for child in children:
        child.read()
    for child in children:
        child.write("go")
    assert [child.wait() for child in children] == [0, 0, 0]
    assert (work / "count").read_text() == "45"
    assert {f"lease.{n}" for n in range(1, 46)} <= set(os.listdir(folder.path))  # none was deleted
    assert highest(folder.path) == 45


# Looking


def test_only_lease_numbers_count(tmp_path):
    for name in ("2", "10", "011", "0", "x", "99.tmp", "-3", ""):
        (tmp_path / f"lease.{name}").touch()
    for name in (".lease.50", "xlease.60", "lease70"):
        (tmp_path / name).touch()
    assert highest(tmp_path) == 10
    assert highest(tmp_path / "nowhere") == 0


def test_the_check_is_cheap_between_looks_and_never_forgets(tmp_path, monkeypatch):
    lease = acquire(tmp_path, SLOW)
    lease.check()
    record(tmp_path, 2)
    lease.check()  # looked less than a second ago
    with pytest.raises(LeaseLost):
        lease.check(fresh=True)
    clock = time.monotonic() + 2
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    for _ in range(2):
        with pytest.raises(LeaseLost):
            lease.check()


def test_a_folder_that_was_removed_is_a_lost_lease_and_is_not_made_again(tmp_path):
    folder = tmp_path / "stage"
    lease = acquire(folder, SLOW)
    os.unlink(lease.path)
    os.rmdir(folder)
    with pytest.raises(LeaseLost, match="disappeared"):
        lease.check(fresh=True)
    with pytest.raises(FileNotFoundError):
        lease.release()
    assert not folder.exists()


# The heartbeat


def heartbeats():
    return [thread for thread in threading.enumerate() if thread.name == "lease"]


def test_the_heartbeat_runs_from_entering_to_leaving(store, make):
    folder = make()
    attempt = folder.attempt({})
    assert not heartbeats()
    with attempt:
        assert len(heartbeats()) == 1
        before = read(folder.path).facts["beats"]
        time.sleep(5 * store.lease_times.heartbeat)
        assert read(folder.path).facts["beats"] > before
    assert not heartbeats()
    after = read(folder.path)
    assert after.facts["released"] is True
    time.sleep(3 * store.lease_times.heartbeat)
    assert read(folder.path) == after


def test_the_heartbeat_stops_with_an_exception_too(make):
    with pytest.raises(ZeroDivisionError), make().attempt({}):
        raise ZeroDivisionError
    assert not heartbeats()


def test_a_heartbeat_that_cannot_write_says_so_once_and_goes_on(store, make, monkeypatch, caplog):
    folder = make()
    with folder.attempt({}):
        real = leases._put

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(leases, "_put", full)
        time.sleep(5 * store.lease_times.heartbeat)
        monkeypatch.setattr(leases, "_put", real)
        before = read(folder.path).facts["beats"]
        time.sleep(5 * store.lease_times.heartbeat)
        assert read(folder.path).facts["beats"] > before
    assert len([r for r in caplog.records if "no heartbeat" in r.message]) == 1


FORKED = """
attempt = folder().attempt({})      # taken before the fork, as nothing in zexp does: entering is what counts
pid = os.fork()
if pid == 0:
    with attempt:
        say(os.getpid())
        sys.stdin.readline()
        attempt.publish(attempt.scratch("result"), "result")
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
say("done")
"""


def test_the_process_that_enters_an_attempt_beats_for_it_after_a_fork(store, make, start):
    folder = make()
    child = start(folder, FORKED)
    worker = int(child.read())
    assert read(folder.path).facts["pid"] == worker != child.pid
    before = read(folder.path).facts["beats"]
    time.sleep(5 * store.lease_times.heartbeat)
    assert read(folder.path).facts["beats"] > before
    child.write("")
    assert child.read() == "done"
    assert child.wait() == 0
    assert folder.result is not None and read(folder.path).facts["released"] is True


UNWINDING = """
attempt = folder().attempt({})
with attempt:
    scratch = attempt.scratch("result")
    children = []
    for _ in range(50):             # while the heartbeat runs: no lock may be caught in the fork
        pid = os.fork()
        if pid == 0:
            sys.exit(7)             # unwinds through the parent's with
        children.append(pid)
    codes = {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children}
    assert codes == {7}, codes
    assert scratch.exists()
    attempt.check()
    say(attempt.publish(scratch, "result"))
"""


def test_a_forked_child_that_unwinds_through_its_parents_attempt_releases_nothing(make, start):
    folder = make()
    child = start(folder, UNWINDING)
    assert child.read() == "True"
    assert child.wait() == 0
    assert folder.last_attempt().failure() is None


def test_a_lease_is_taken_at_once_or_not_at_all(tmp_path):
    times = leases.LeaseTimes()
    first = leases.take(tmp_path / "slot", times)
    assert first is not None and first.n == 1
    # This process is alive, so nobody else gets it, however often it is asked.
    assert leases.take(tmp_path / "slot", times) is None
    first.beat()
    assert leases.take(tmp_path / "slot", times, gone=lambda path: path.name == "lease.1").n == 2
    with pytest.raises(LeaseLost):
        first.check(fresh=True)


def test_a_released_lease_is_taken_at_once(tmp_path):
    first = leases.take(tmp_path / "slot", leases.LeaseTimes())
    first.release()
    assert leases.take(tmp_path / "slot", leases.LeaseTimes()).n == 2
