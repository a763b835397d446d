"""Renamed first, deleted then; and a lease that makes no attempt."""

import os

import pytest

from zexp.store import inventory, lease, trash

HOLD = """
attempt = folder().attempt({})
attempt.__enter__()
say("held")
time.sleep(600)
"""


def test_a_held_lease_leaves_no_attempt_and_is_released(make):
    folder = make()
    with folder.attempt({}):
        pass
    with trash.held(folder) as taken:
        assert taken.n == 2 and folder.holder()["pid"] == os.getpid()
    assert [record.n for record in folder.attempts()] == [1]
    assert folder.holder() is None
    with folder.attempt({}) as attempt:
        assert attempt.n == 3


def test_what_a_live_process_holds_is_busy_at_once_and_what_a_killed_one_held_is_free(make, start):
    folder = make()
    child = start(folder, HOLD)
    assert child.read() == "held"
    with pytest.raises(trash.Busy, match=f"process {child.pid} on .* works in it"), trash.held(folder):
        pass
    child.process.kill()
    child.wait()
    with trash.held(folder):
        pass


def test_a_folder_that_is_gone_is_not_made_again(make, store):
    folder = make()
    moved = trash.away(store, folder.path, "eval-x")
    with pytest.raises(trash.Busy, match="gone"), trash.held(folder):
        pass
    assert not folder.path.exists() and trash.back(moved)
    assert folder.semantic() == {}


def test_a_stage_in_the_trash_is_its_removers_until_that_one_is_dead(make, store):
    folder = make()
    with trash.held(folder) as taken:
        taken.stop()
        moved = trash.away(store, folder.path, "eval-x")
        assert trash.in_use(moved.now)
        assert trash.back(moved)
    assert not trash.in_use(folder.path) and lease.read(folder.path).free


def test_nothing_is_put_back_over_something(make):
    folder = make("trajectory")
    for name in ("states/10", "states/10/weights"):
        (folder.path / name).mkdir(parents=True)
    one = trash.aside(folder, folder.path / "states/10")
    assert folder.states() == [] and str(one.now) in inventory.see(folder.store, "trajectory", folder.path.name).leftovers
    (folder.path / "states/10").mkdir()
    assert not trash.back(one)
    (folder.path / "states/10").rmdir()
    assert trash.back(one) and (folder.path / "states/10/weights").is_dir()
