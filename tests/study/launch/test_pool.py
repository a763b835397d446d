"""Units of a machine, locked by real processes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zexp.config.errors import ConfigError
from zexp.store.process import this_process
from zexp.study.launch import pool as pools
from zexp.study.launch.pool import Pool
from zexp.study.launch.turn import Unit

ROOT = Path(__file__).parents[3]
TWO = (Unit("core-0"), Unit("core-1"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(pools.VARIABLE, str(tmp_path / "slots"))
    return tmp_path / "slots"


@pytest.fixture
def pool():
    """pool(units): another run, as far as locks and notes tell; closed when the test ends."""
    made = []

    def make(units=TWO):
        made.append(Pool(units))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_unit_is_held_once_until_it_is_given_back(pool):
    one, other = pool(), pool()
    first, second = one.take(1), one.take(1)
    assert {*first.units, *second.units} == set(TWO)
    assert one.take(1) is None and other.take(1) is None
    one.rest()
    one.give_back(second)
    assert other.take(1).units == second.units


def test_two_cores_are_taken_together_or_not_at_all(pool):
    one, other = pool(), pool()
    held = one.take(1)
    assert other.take(2) is None
    one.give_back(held)
    assert other.take(2).units == TWO


def test_a_lease_that_was_handed_over_ends_with_the_last_process_that_has_it(pool):
    one, other = pool(TWO[:1]), pool(TWO[:1])
    held = one.take(1)
    worker = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=held.descriptors)
    one.give_back(held)
    assert other.take(1) is None
    worker.kill()
    worker.communicate()
    assert other.take(1) is not None


def test_a_killed_run_holds_nothing_and_its_note_goes(pool, folder):
    code = (
        "import sys\nfrom zexp.study.launch.pool import Pool\nfrom zexp.study.launch.turn import Unit\n"
        "held = Pool([Unit('core-0')]).take(1)\nprint('took', flush=True)\nsys.stdin.readline()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert child.stdout.readline() == b"took\n"
    mine = pool(TWO[:1])
    assert mine.take(1) is None
    assert mine.users() == [f"process {child.pid} (-c)"]
    child.kill()
    child.communicate()
    assert mine.take(1) is not None
    assert [path.name for path in folder.glob("run-*")] == [mine.note.name]


def test_what_was_noted_before_a_reboot_counts_for_nothing(pool, folder):
    old = {**this_process(), "boot": "another", "name": "run-1-a.json", "command": "zexp run", "held": [["core-0", None]]}
    folder.mkdir()
    (folder / "run-1-a.json").write_text(json.dumps({**old, "wants": {"count": 1, "since": 0.0, "units": [["core-1", None]]}}))
    mine = pool()
    first, second = mine.take(1), mine.take(1)
    assert first is not None and second is not None and mine.users() == []
    assert not (folder / "run-1-a.json").exists()


def test_who_holds_less_gets_what_becomes_free(pool):
    rich, poor = pool(), pool()
    first, second = rich.take(1), rich.take(1)
    assert poor.take(1) is None
    rich.give_back(first)
    assert rich.take(1) is None, "the other one's turn"
    assert rich.users() == [f"process {os.getpid()} ({pools.command()})"]
    taken = poor.take(1)
    assert taken.units == first.units
    rich.give_back(second)
    assert rich.take(1).units == second.units, "the other one wants no more"


def test_a_run_that_waits_and_is_stopped_does_not_keep_the_others_waiting(pool):
    rich, stopped = pool(), pool()
    first, _ = rich.take(1), rich.take(1)
    assert stopped.take(1) is None
    rich.give_back(first)
    assert rich.take(1) is None
    past = time.time() - pools.FRESH_SECONDS - 1
    os.utime(stopped.note, (past, past))
    assert rich.take(1) is not None


def test_a_run_that_has_nothing_to_start_any_more_waits_for_nothing(pool):
    rich, poor = pool(), pool()
    first, _ = rich.take(1), rich.take(1)
    assert poor.take(1) is None and poor.waits
    poor.rest()
    assert not poor.waits
    rich.give_back(first)
    assert rich.take(1) is not None


def test_shares_of_a_gpu_and_the_whole_of_it_exclude_each_other(pool):
    shares, whole = pool([Unit("GPU-a", n) for n in range(2)]), pool([Unit("GPU-a"), Unit("GPU-b")])
    first = shares.take(1)
    assert whole.take(1).units == (Unit("GPU-b"),)
    assert whole.take(1) is None
    whole.rest()
    second = shares.take(1)
    for held in (first, second):
        shares.give_back(held)
    assert whole.take(1).units == (Unit("GPU-a"),)
    assert shares.take(1) is None


def test_a_removed_lock_file_is_no_lock(pool, folder):
    one = pool(TWO[:1])
    one.take(1)
    (folder / "core-0").unlink()
    assert pool(TWO[:1]).take(1) is not None, "a new file: what the old one said is lost"


def test_an_emptied_folder_does_not_end_a_run(pool, folder):
    one = pool(TWO[:1])
    held = one.take(1)
    for path in folder.iterdir():
        path.unlink()
    one.give_back(held)
    assert one.take(1) is not None
    assert one.note.exists()


def test_the_folder_and_its_files_are_for_all_users(pool, folder):
    before = os.umask(0o077)
    try:
        one = pool()
        one.take(1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o1777
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    assert json.loads(one.note.read_text())["pid"] == this_process()["pid"]


def test_a_folder_that_cannot_be_used_is_refused_with_the_variable_that_names_another(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(pools.VARIABLE, str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="ZEXP_SLOTS_DIR=DIR"):
        Pool(TWO)


def test_many_units_are_one_lease(pool):
    one = pool([Unit(f"core-{n}") for n in range(200)])
    assert len(one.take(200).units) == 200
    assert one.take(1) is None
