"""Several runs on one machine of two cores: real drivers, fake stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.study.launch import handlers
from tests.study.launch.test_local import ROOT, wait_for
from tests.study.launch.tree import Tree, statuses
from zexp.store.folder import Store
from zexp.store.lease import LeaseTimes
from zexp.store.process import this_process
from zexp.study.launch import machine
from zexp.study.launch.local import LocalLaunch
from zexp.study.launch.pool import VARIABLE, Pool
from zexp.study.launch.turn import Unit

CORES = (Unit("core-0"), Unit("core-1"))
DRIVER = """
import json, sys
from pathlib import Path
from tests.study.launch.tree import Tree
from zexp.store.folder import Store
from zexp.store.lease import LeaseTimes
from zexp.store.process import this_process
from zexp.study.launch import machine
machine.core_numbers = lambda: [0, 1]
tree = Tree(Path(sys.argv[1]))
def show(event):
    if event.kind != "tick":
        print(json.dumps([event.kind, event.stage and event.stage.id, event.text]), flush=True)
class Events(list):
    append = staticmethod(show)
tree.events = Events()
for id, parents, request in json.loads(sys.argv[2]):
    tree.add(id, *parents, **request)
outcomes = tree.launch(**{"slots": None, **json.loads(sys.argv[3])})
print(json.dumps({id: [one.status, one.tries, one.seconds] for id, one in outcomes.items()}))
"""


class Driver:
    """A run in a process of its own. stages: (id, parents, request)."""

    def __init__(self, root: Path, *stages: tuple[str, list[str], dict[str, Any]], **options: Any) -> None:
        command = [sys.executable, "-c", DRIVER, str(root), json.dumps(stages), json.dumps(options)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        self.events: list[list[Any]] = []
        self.outcomes: dict[str, list[Any]] = {}
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            if isinstance(said, dict):
                self.outcomes = said
            else:
                self.events.append(said)

    def said(self, kind: str, stage: str | None = None) -> list[str]:
        return [text for its, of, text in self.events if its == kind and stage in (None, of)]

    def end(self, seconds: float = 60.0) -> dict[str, list[Any]]:
        self.process.wait(seconds)
        self._reader.join()
        return self.outcomes

    def kill(self) -> None:
        self.process.kill()
        self.end()


@pytest.fixture
def drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts drivers that share a machine of two cores with nobody else."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "slots"))
    started: list[Driver] = []

    def start(*arguments: Any, **options: Any) -> Driver:
        started.append(Driver(*arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "slots"))
    monkeypatch.setattr(machine, "core_numbers", lambda: [0, 1])
    return Tree(tmp_path / "store")


def most_at_once(records: list[dict[str, Any]], weights: dict[str, int] | None = None) -> int:
    """The most stages (or cores of stages) that ran at one time."""
    now = most = 0
    for line in sorted(records, key=lambda line: line["time"]):
        weight = (weights or {}).get(line["stage"], 1)
        now += {"start": weight, "end": -weight}.get(line["what"], 0)
        most = max(most, now)
    return most


def test_two_runs_together_never_use_more_than_the_machine_has(tmp_path, drivers):
    stages = [(str(n), [], {"seconds": 0.4}) for n in range(6)]
    roots = [tmp_path / "one", tmp_path / "two"]
    both = [drivers(root, *stages) for root in roots]
    for one in both:
        assert {status for status, *_ in one.end().values()} == {"done"}
    assert most_at_once([line for root in roots for line in handlers.read(root)]) == 2


def test_a_run_with_much_to_do_does_not_starve_a_later_one(tmp_path, drivers):
    first = drivers(tmp_path / "one", *[(str(n), [], {"seconds": 0.4}) for n in range(60)])
    wait_for(lambda: len(first.said("started")) >= 2)
    second = drivers(tmp_path / "two", ("a", [], {}), ("b", ["a"], {}))
    assert {status for status, *_ in second.end().values()} == {"done"}
    assert first.outcomes == {} and len(first.said("started")) < 60, "twelve seconds of work"
    first.kill()


def test_a_run_that_comes_to_a_full_machine_says_who_has_it_and_a_killed_one_leaves_it_at_once(tmp_path, drivers):
    first = drivers(tmp_path / "one", ("a", [], {"act": "train", "seconds": 60}), ("b", [], {"act": "train", "seconds": 60}))
    wait_for(lambda: [line["what"] for line in handlers.read(tmp_path / "one")].count("training") == 2)
    second = drivers(tmp_path / "two", ("c", [], {}))
    (said,) = wait_for(lambda: second.said("slot"))
    assert said.startswith(f"All 2 slots of this machine are in use by process {first.process.pid} (-c ")
    assert said.endswith("); waiting.")
    assert handlers.read(tmp_path / "two") == []
    first.kill()
    began = time.monotonic()
    assert second.end()["c"][0] == "done"
    assert time.monotonic() - began < 10
    assert [line["what"] for line in handlers.read(tmp_path / "one")].count("checkpoint") == 2


def test_slots_without_work_are_given_back_to_a_run_that_has_some(tmp_path, drivers):
    chain = [("wide 1", [], {"seconds": 0.3}), ("wide 2", [], {"seconds": 0.3}), ("long", ["wide 1", "wide 2"], {"seconds": 6})]
    first = drivers(tmp_path / "one", *chain)
    wait_for(lambda: first.said("started", "long"))
    second = drivers(tmp_path / "two", ("c", [], {}), ("d", ["c"], {}))
    assert {status for status, *_ in second.end().values()} == {"done"}
    assert first.outcomes == {}, "it is still at its long stage"


def test_studies_that_overlap_run_each_shared_stage_once(tmp_path, drivers):
    shared = [("data", [], {"seconds": 0.3}), ("trunk", ["data"], {"seconds": 1.5})]
    root = tmp_path / "store"
    one = drivers(root, *shared, ("left", ["trunk"], {}), ("both", ["trunk"], {"seconds": 0.3}))
    two = drivers(root, *shared, ("right", ["trunk"], {}), ("both", ["trunk"], {"seconds": 0.3}))
    outcomes = {**one.end(), **two.end()}
    assert {status for status, *_ in outcomes.values()} == {"done"}
    starts = sorted(line["stage"] for line in handlers.read(root) if line["what"] == "start")
    assert starts == ["both", "data", "left", "right", "trunk"]
    assert {path.name for path in root.glob("*/*/attempts/*")} == {"1"}


def test_a_stage_in_other_hands_takes_no_slot_and_is_done_when_it_is_done_there(tmp_path, drivers):
    root = tmp_path / "store"
    one = drivers(root, ("shared", [], {"seconds": 4}))
    wait_for(lambda: one.said("started", "shared"))
    two = drivers(root, ("shared", [], {"seconds": 4}), ("below", ["shared"], {}), ("own", [], {}))
    wait_for(lambda: two.said("finished", "own"))
    pool = Pool(CORES)
    held = wait_for(lambda: pool.take(1), 3)
    assert not two.said("finished", "shared"), "the free core is taken while it waits"
    pool.give_back(held)
    pool.close()
    assert two.end()["shared"] == ["done", 0, 0.0]
    assert two.end()["below"][0] == "done"
    (holder,) = [line["pid"] for line in handlers.read(root) if line["stage"] == "shared" and line["what"] == "start"]
    (said,) = two.said("waiting")
    assert said.startswith(f"waits for process {holder} on ") and said.endswith(", which has it in hand")


def test_a_stage_whose_holder_dies_is_run_by_who_waited_for_it(tmp_path, drivers):
    root = tmp_path / "store"
    one = drivers(root, ("shared", [], {"act": "train", "seconds": 60}))
    wait_for(lambda: one.said("started", "shared"))
    two = drivers(root, ("shared", [], {}))
    wait_for(lambda: two.said("waiting", "shared"))
    one.kill()
    assert two.end()["shared"][:2] == ["done", 1]
    assert [line["n"] for line in handlers.read(root) if line["what"] == "start"] == [1, 2]


class Somebody:
    """Another process's lease of a stage, for some time: this process's own, from a thread."""

    def __init__(self, tree: Tree, stage_id: str, seconds: float) -> None:
        stage = next(one for one in tree.stages if one.id == stage_id)
        kind, _, name = stage.folder.partition("/")
        (self.folder,) = tree.store.find(name, kind)
        self.seconds = seconds
        self.attempt = self.folder.attempt({})
        self.thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        assert self.attempt is not None
        with self.attempt as attempt:
            time.sleep(self.seconds)
            attempt.publish(attempt.scratch("result"), "result")

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: Any) -> None:
        self.thread.join()


def test_what_is_free_runs_while_others_have_the_rest(tree):
    tree.add("theirs", cost=9)
    tree.add("below", "theirs")
    for n in range(3):
        tree.add(f"free{n}", seconds=0.1)
    with Somebody(tree, "theirs", 2.0):
        outcomes = tree.launch(slots=1)
    assert set(statuses(outcomes).values()) == {"done"}
    assert tree.started() == ["free0", "free1", "free2", "below"]
    assert len([event for event in tree.events if event.kind == "waiting"]) == 1
    assert (outcomes["theirs"].seconds, outcomes["theirs"].tries, outcomes["theirs"].log) == (0.0, 0, None)


def test_a_stage_that_is_taken_at_the_last_moment_gives_its_slot_to_another_one(tree, monkeypatch):
    tree.add("theirs", cost=9)
    tree.add("free")
    look = LocalLaunch._is_elsewhere

    def blind_at_first(self, stage):
        return any(event.kind == "waiting" for event in tree.events) and look(self, stage)

    monkeypatch.setattr(LocalLaunch, "_is_elsewhere", blind_at_first)
    with Somebody(tree, "theirs", 6.0):
        outcomes = tree.launch(slots=1)
    assert statuses(outcomes) == {"theirs": "done", "free": "done"}
    finished = [event.stage.id for event in tree.events if event.kind == "finished"]
    assert finished == ["free", "theirs"]
    assert outcomes["theirs"].tries == 0
    assert len([event for event in tree.events if event.kind == "waiting"]) == 1


def test_a_stage_whose_holder_on_another_machine_is_silent_is_taken_over(tree):
    tree.store = Store(tree.store.root, LeaseTimes(heartbeat=0.2, timeout=1.5, poll=0.05))
    stage = tree.add("theirs")
    facts = {**this_process(), "host": "far", "boot": "another", "beats": 3, "released": False}
    (tree.store.root / stage.folder / "lease.1").write_text(json.dumps(facts))
    tree.add("free")
    outcomes = tree.launch(slots=1)
    assert statuses(outcomes) == {"theirs": "done", "free": "done"}
    assert tree.started() == ["free", "theirs"]
    assert tree.record("start")[1]["n"] == 2
    (said,) = [event.text for event in tree.events if event.kind == "waiting"]
    assert said.endswith("on far, which has it in hand")


def test_evals_that_share_a_job_with_one_that_is_taken_run_without_it(tree, monkeypatch):
    tree.add("state", kind="segment")
    for n in range(3):
        tree.add(f"eval{n}", "state", kind="eval")
    with Somebody(tree, "eval0", 3.0):
        outcomes = tree.launch(slots=1, preload=())
    assert set(statuses(outcomes).values()) == {"done"}
    assert tree.started() == ["state", "eval1", "eval2"]


def test_a_stage_takes_as_many_cores_as_it_has_threads(tree, monkeypatch):
    monkeypatch.setattr(machine, "core_numbers", lambda: [0, 1, 2])
    weights = {"wide": 3, "two": 2, "one": 1, "three": 1, "four": 1}
    for id, threads in weights.items():
        tree.add(id, threads=threads, seconds=0.4)
    assert set(statuses(tree.launch(slots=None)).values()) == {"done"}
    assert most_at_once(tree.record(), weights) == 3
    assert {line["stage"]: line["OMP_NUM_THREADS"] for line in tree.record("start")} == {k: str(n) for k, n in weights.items()}


def test_a_stage_with_more_threads_than_cores_has_the_machine_for_itself(tree):
    tree.add("wide", threads=16, seconds=0.3)
    tree.add("other", seconds=0.3)
    assert set(statuses(tree.launch(slots=None)).values()) == {"done"}
    assert most_at_once(tree.record()) == 1


@pytest.mark.parametrize(
    ("options", "visible", "at_once"),
    [({"gpus_per_stage": 2}, {"3,1", "0,2"}, 2), ({"stages_per_gpu": 2}, {"3", "1", "0", "2"}, 8)],
)
def test_stages_see_their_gpus_of_a_preset(tree, monkeypatch, options, visible, at_once):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,0,2")
    for n in range(at_once):
        tree.add(str(n), device="auto", seconds=1.5)
    tree.launch(slots=None, **options)
    assert {line["CUDA_VISIBLE_DEVICES"] for line in tree.record("start")} == visible
    assert 1 < most_at_once(tree.record()) <= at_once


def test_spawned_children_hold_their_units_too(tree):
    tree.add("a", act="train", seconds=3)
    taken = []

    def look(event):
        tree.events.append(event)
        if event.kind == "started":
            pool = Pool(CORES)
            taken.extend([pool.take(1), pool.take(1)])
            pool.close()

    tree.launch(start_method="spawn", on_event=look)
    assert taken[0] is not None and taken[1] is None
