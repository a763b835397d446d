"""gc: what no study needs goes, what any study needs stays, whatever is done, half done, killed or running."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import composed
from tests.study.test_plan import SMALL, TEXTS
from zexp.store import files, inventory, trash
from zexp.store.errors import StoreError
from zexp.store.folder import StageFolder, Store
from zexp.store.lease import LeaseTimes
from zexp.study import execute, gc, record, recorded
from zexp.study import plan as plans
from zexp.study.resolve import Composed, Resolver, Variant

# Name -> overrides. They share trunks, decays and forks, extend each other, and fork where others end.
POOL: dict[str, tuple[str, ...]] = {
    "short": ("anneal=none",),
    "long": ("anneal=none", "phases.pretrain.tokens=16K"),
    "control": ("anneal=control",),
    "replay": ("anneal=replay60",),
    "reset": ("anneal=replay60", "anneal.optimizer_state=reset"),
    "later": ("anneal=control", "phases.pretrain.tokens=16K"),
    "whole": ("anneal=replay60", "checkpoint.keep.ends=all"),
    "unscored": ("anneal=control", "eval.tasks=[]"),
    "cosine": ("anneal=none", "schedule=cosine", "schedule.warmup_tokens=1K"),
    "open": ("anneal=none", "schedule=constant", "schedule.warmup_tokens=0"),
    "other": ("anneal=none", "seed=1"),
}
STEP = 512
NOW = gc.Options(young=0.0)
ORPHANS = gc.Options(young=0.0, orphans=True, revisions=0)


class Pool(dict[str, Variant]):
    def __repr__(self) -> str:
        return "POOL"  # else hypothesis writes them all out when an example fails


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Variant]:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(TEXTS)
    (folder / "b.txt").write_text(TEXTS.replace("says", "holds"))
    made = Pool()
    for name, overrides in POOL.items():
        anneal = overrides[0].split("=")[1]
        small = [o for o in SMALL if anneal != "none" or not o.startswith("anneal.")]
        mixed = ["anneal.mix.sources.high_quality.max_epochs=null"] if anneal == "replay60" else []
        ladder = f"checkpoint.keep.ladder={'false' if name in ('short', 'replay') else 'true'}"
        config = composed.config(overrides[0], *small, *mixed, ladder, *overrides[1:])
        one = Composed(config, {"arch": "transformer_tiny", "anneal": anneal}, {"n": name}, list(overrides))
        made[name] = Resolver(folder / "store", folder).variant(one)
    return made


@contextmanager
def empty_store() -> Iterator[Store]:
    with tempfile.TemporaryDirectory() as folder, patch("os.fsync"):
        yield Store(Path(folder) / "store", LeaseTimes(heartbeat=5.0, timeout=30.0, poll=0.01), patience=0.0)


def publish(folder: StageFolder, place: str, *, rolling: bool = False, optimizer: bool = True) -> None:
    """A state or a result as a run leaves it, with a byte in each part."""
    path = folder.path / place
    if path.exists():
        return
    (path / "weights").mkdir(parents=True)
    (path / "weights" / "a").write_bytes(b"w")
    if optimizer and place != "result":
        (path / "optimizer").mkdir()
        (path / "optimizer" / "a").write_bytes(b"o" * 100)
    manifest = {"droppable": ["optimizer"], "bins": 100_000} | ({"rolling": True} if rolling else {})
    files.write_json(path / "manifest.json", manifest)
    files.write_manifest(path)


def write_down(store: Store, name: str, variants: list[Variant]) -> plans.Plan:
    """What `zexp run` does before anything is trained: the study's record, its folders, its pins."""
    plan = plans.build(variants, store)
    record.record(name, {"question": None, "metric": None, "baseline": {}}, plan, store)
    execute._create(plan, store)
    return plan


def finish(store: Store, plan: plans.Plan, upto: Callable[[plans.Stage], str]) -> None:
    """Let stages end as upto says: done, part (a rolling state or two on the way) or missing; what needs them is missing."""
    lost: set[str] = set()
    for stage in plan.stages.values():
        folder = store.folder("trajectory" if stage.kind == "segment" else stage.kind, stage.full_id)
        outcome = "missing" if lost & set(stage.parents) or not folder.path.exists() else upto(stage)
        if outcome != "done":
            lost.add(stage.id)
        if stage.kind != "segment":
            if outcome == "done":
                publish(folder, "result")
            continue
        steps = range((stage.start or 0) + STEP, (stage.to or 0), STEP)
        if outcome in ("done", "part"):
            kept = set(stage.request["keep"])
            reached = list(steps) if outcome == "done" else list(steps)[: len(steps) // 2]
            for tokens in reached:
                if tokens in kept:
                    publish(folder, f"states/{tokens}")
            for tokens in [t for t in reached if t not in kept][-4:]:
                publish(folder, f"states/{tokens}", rolling=True)
        if outcome == "done":
            publish(folder, f"states/{stage.to}")


def collect(store: Store, options: gc.Options) -> gc.Done:
    stamp = recorded.stamp(store)
    seen = inventory.look(store)
    decision = gc.decide(seen, recorded.records(store, options.revisions), options, time.time())
    return gc.carry_out(seen, decision, options, stamp)


def work(store: Store, variants: list[Variant]) -> dict[str, int]:
    """Stage -> tokens, of what a run of these variants would do now: by the plan that a run makes."""
    return {stage.id: stage.to_train for stage in plans.build(variants, store).to_do}


MEMBERS = st.lists(st.sampled_from(sorted(POOL)), min_size=1, max_size=4, unique=True)
def ancestors(store: Store, records: list[recorded.Record]) -> dict[tuple[str, int], int]:
    """(trajectory, tokens) of each named state from which nobody can train -> the state before it from which somebody can."""
    stages, found = inventory.look(store).stages, {}
    for stage in (stage for one in records for stage in one.listed["stages"] if stage["kind"] == "segment"):
        seen = stages.get(stage["folder"])
        trainable = [] if seen is None else [t for t, state in seen.states.items() if state.trainable]
        if stage["to"] not in trainable:
            found[stage["folder"], stage["to"]] = max((t for t in trainable if t < stage["to"]), default=0)
    return found


STUDIES = st.dictionaries(st.sampled_from("abc"), MEMBERS, min_size=1)


@settings(max_examples=60)
@given(
    studies=STUDIES,
    removed=st.sets(st.sampled_from("abc")),
    revised=st.dictionaries(st.sampled_from("abc"), st.sampled_from(sorted(POOL)), max_size=1),
    outcomes=st.lists(st.sampled_from(("done", "done", "done", "part", "missing")), min_size=7, max_size=7),
    options=st.sampled_from((NOW, ORPHANS, gc.Options(young=0.0, orphans=True))),
    scored=st.booleans(),
)
def test_no_study_has_more_to_train_after_gc_than_before(pool, studies, removed, revised, outcomes, options, scored):
    with empty_store() as store:
        for name, members in studies.items():
            plan = write_down(store, name, [pool[m] for m in members])
            finish(store, plan, lambda stage: outcomes[int(stage.id[:4], 16) % 7])
            if scored:
                execute._drop_optimizers(plan, store)
        for name, member in revised.items():
            if name in studies:
                studies[name] = [member]
                write_down(store, name, [pool[member]])
        for name in removed & set(studies):
            trash.delete(store.study(name))
        left = {name: [pool[m] for m in members] for name, members in studies.items() if name not in removed}
        before = {name: work(store, variants) for name, variants in left.items()}
        near = ancestors(store, recorded.records(store, options.revisions))
        collect(store, options)
        assert {name: work(store, variants) for name, variants in left.items()} == before
        after = ancestors(store, recorded.records(store, options.revisions))
        assert near.items() <= after.items(), "the last ancestor of a named state stays"
        for name in left:  # and nothing that is left has lost what it is made from
            look = inventory.look(store)
            assert not look.strays
            for seen in look.stages.values():
                parent = seen.semantic.get("parent")
                assert not (parent and seen.states) or f"trajectory/{parent['id'][:16]}" in look.stages, name
        again = gc.decide(inventory.look(store), recorded.records(store, options.revisions), options, time.time())
        assert again.drops == [], "a second look finds nothing"


def all_done(stage: plans.Stage) -> str:
    return "done"


def test_what_goes_is_what_no_class_of_kept_states_holds(pool):
    with empty_store() as store:
        plan = write_down(store, "a", [pool["later"]])
        finish(store, plan, all_done)
        trunk, _, end = (store.folder("trajectory", s.full_id) for s in plan.stages.values() if s.kind == "segment")
        ladder = plans.ladder(0, 14336, STEP)
        assert set(trunk.states()) > ladder
        rolling = [t for t, state in inventory.look(store).stages[str(trunk)].states.items() if state.rolling]
        assert len(rolling) == 4
        publish(trunk, "states/3584")  # on the ladder of a study that was never heard of again
        assert 3584 not in ladder
        done = collect(store, NOW)
        assert set(trunk.states()) == ladder | set(rolling[-2:])
        assert {d.reason for d in done.dropped if d.place == "states/3584"} == {gc.LADDER}
        assert end.state(18432) and end.trainable(18432) is None, "scored, and nobody goes on from it"
        (light,) = (d for d in done.dropped if d.reason == gc.OPTIMIZERS)
        assert light.size.apparent == 100 and light.again == 512, "from the newest rolling state"


def test_the_state_that_an_unfinished_stage_would_be_resumed_from_stays(pool):
    with empty_store() as store:
        plan = write_down(store, "a", [pool["short"]])
        finish(store, plan, lambda stage: "done" if stage.kind != "segment" else "missing")
        trunk = next(s for s in plan.stages.values() if s.kind == "segment")
        folder = store.folder("trajectory", trunk.full_id)
        for tokens in (512, 1024, 1536, 8192, 8704):  # a longer study, removed since, went on from there
            publish(folder, f"states/{tokens}", rolling=True)
        assert work(store, [pool["short"]])[trunk.id] == 7168 - 1536
        done = collect(store, ORPHANS)
        assert folder.states() == [1536, 8192, 8704]
        assert {drop.place for drop in done.dropped} == {"states/512", "states/1024"}


def test_what_only_a_removed_study_named_goes_with_orphans_alone(pool):
    with empty_store() as store:
        finish(store, write_down(store, "a", [pool["short"]]), all_done)
        finish(store, write_down(store, "b", [pool["later"]]), all_done)
        short = work(store, [pool["short"]])
        before = set(inventory.look(store).stages)
        trash.delete(store.study("b"))
        collect(store, NOW)
        assert set(inventory.look(store).stages) == before, "weeks of training may hang on it"
        done = collect(store, ORPHANS)
        assert any(drop.reason == gc.ORPHAN for drop in done.dropped)
        assert {d.reason for d in done.dropped} >= {gc.ORPHANED_STATE, gc.PINS}
        named = recorded.records(store)[0].folders
        assert set(inventory.look(store).stages) == named
        assert work(store, [pool["short"]]) == short == {}
        assert work(store, [pool["later"]]), "which is what removing it means"


def test_an_earlier_revision_counts_unless_it_is_said_not_to(pool):
    with empty_store() as store:
        finish(store, write_down(store, "a", [pool["control"]]), all_done)
        finish(store, write_down(store, "a", [pool["other"]]), all_done)
        kept = gc.Options(young=0.0, orphans=True)
        assert not [d for d in collect(store, kept).dropped if d.reason == gc.ORPHAN]
        assert work(store, [pool["control"]]) == {}
        assert [d for d in collect(store, ORPHANS).dropped if d.reason == gc.ORPHAN]
        assert work(store, [pool["other"]]) == {}


def test_what_is_young_or_held_stays_with_all_that_it_is_made_from(pool):
    with empty_store() as store:
        finish(store, write_down(store, "b", [pool["control"]]), all_done)
        trash.delete(store.study("b"))
        young = collect(store, gc.Options(orphans=True))
        assert not young.dropped
        stages = plans.build([pool["control"]], store).stages.values()
        end = next(s for s in stages if s.kind == "segment" and s.phase == "anneal")
        folder = store.folder("trajectory", end.full_id)
        with folder.attempt({"to": 1}):
            decision = gc.decide(inventory.look(store), [], ORPHANS, time.time())
            assert f"process {os.getpid()}" in decision.skipped[str(folder)]
            done = collect(store, ORPHANS)
        left = inventory.look(store)
        assert set(left.stages) == left.closure([str(folder)]) and len(left.stages) > 5
        whole = {drop.stage.partition("/")[0] for drop in done.dropped if drop.place == ""}
        assert whole == {"eval", "tasks", "corpus"}, "the corpus is one that only a task reads"
        fork = store.folder("trajectory", left.stages[str(folder)].semantic["parent"]["id"])
        assert fork.trainable(8192), "it is trained from there"


def test_a_stage_whose_lease_is_taken_after_the_decision_is_skipped_and_so_is_what_it_is_made_from(pool):
    with empty_store() as store:
        finish(store, write_down(store, "b", [pool["control"]]), all_done)
        trash.delete(store.study("b"))
        seen = inventory.look(store)
        decision = gc.decide(seen, [], ORPHANS, time.time())
        stages = plans.build([pool["control"]], store).stages.values()
        end = store.folder("trajectory", next(s for s in stages if s.kind == "segment" and s.phase == "anneal").full_id)
        with end.attempt({"to": 1}):
            done = gc.carry_out(seen, decision, ORPHANS, recorded.stamp(store))
        left = inventory.look(store)
        assert set(left.stages) == left.closure([str(end)]) == set(done.skipped)
        assert "works in it" in done.skipped[str(end)]


def test_a_study_that_is_recorded_while_gc_works_gets_back_what_it_wants(pool):
    with empty_store() as store:
        finish(store, write_down(store, "b", [pool["control"]]), all_done)
        trash.delete(store.study("b"))
        seen, stamp = inventory.look(store), recorded.stamp(store)
        decision = gc.decide(seen, [], ORPHANS, time.time())
        assert len(decision.drops) == len(seen.stages)
        write_down(store, "c", [pool["short"]])
        done = gc.carry_out(seen, decision, ORPHANS, stamp)
        assert done.restored and work(store, [pool["short"]]) == {}
        assert set(inventory.look(store).stages) == recorded.records(store)[0].folders
        assert not inventory.look(store).leftovers


def test_a_run_that_begins_while_gc_works_finds_later_what_it_saw_at_its_last_look(pool):
    """Threads of one process: the files are what they share. What a run saw as done after its record and its pins stood
    may be away for a moment, and is there at the end."""
    for round_ in range(12):
        with empty_store() as store:
            finish(store, write_down(store, "b", [pool["control"], pool["short"]]), all_done)
            trash.delete(store.study("b"))
            thread = threading.Thread(target=collect, args=(store, ORPHANS))
            thread.start()
            time.sleep(0.003 * round_)
            plan = write_down(store, "c", [pool["control"]])
            if plans.mark(plan, store):
                execute._create(plan, store)
            saw = {stage.id: stage.to_train for stage in plan.to_do}
            thread.join()
            finds = work(store, [pool["control"]])
            assert finds.keys() <= saw.keys() and all(finds[id] <= saw[id] for id in finds), round_


def test_what_was_recorded_by_hand_wrongly_stops_gc(pool):
    with empty_store() as store:
        finish(store, write_down(store, "a", [pool["short"]]), all_done)
        path = store.study("a") / "variants.json"
        listed = json.loads(path.read_text())
        path.write_text("{")
        with pytest.raises(StoreError, match="not readable JSON"):
            recorded.records(store)
        del listed["stages"][0]["folder"]
        path.write_text(json.dumps(listed))
        with pytest.raises(StoreError, match="an entry of stages has no folder"):
            recorded.records(store)


def test_a_rule_that_would_cost_training_is_caught_before_anything_goes(pool):
    with empty_store() as store:
        plan = write_down(store, "a", [pool["short"]])
        finish(store, plan, lambda stage: "done" if stage.kind != "segment" else "part")
        before = inventory.look(store).stages.keys()
        with patch.object(gc._Decider, "_states", _all_of_them), pytest.raises(StoreError, match="Nothing was deleted"):
            collect(store, NOW)
        states = [seen.states for seen in inventory.look(store).stages.values() if seen.states]
        assert inventory.look(store).stages.keys() == before and len(states) == 1 and len(states[0]) >= 2


def _all_of_them(self: gc._Decider, seen: inventory.Seen) -> int:
    for tokens, state in seen.states.items():
        self.drops.append(gc.Drop(gc.ROLLING, seen.key, f"states/{tokens}", state.path, state.size))
    return 0


def test_old_records_keep_the_optimizers_that_were_pinned(pool):
    with empty_store() as store:
        finish(store, write_down(store, "a", [pool["whole"]]), all_done)
        path = store.study("a") / "variants.json"
        listed = json.loads(path.read_text())
        for row in listed["variants"]:
            del row["keep_ends"]
        path.write_text(json.dumps(listed))
        assert not [d for d in collect(store, ORPHANS).dropped if d.reason == gc.OPTIMIZERS]


def test_killed_between_the_renaming_and_the_deletion_the_store_is_whole_and_the_next_gc_deletes(pool):
    with empty_store() as store:
        finish(store, write_down(store, "a", [pool["control"]]), all_done)
        finish(store, write_down(store, "b", [pool["other"]]), all_done)
        trash.delete(store.study("b"))
        want = work(store, [pool["control"]])

        class Killed(BaseException):
            pass

        def die(path: Path) -> None:
            raise Killed

        while True:
            with patch.object(trash, "delete", die):
                try:
                    collect(store, ORPHANS)
                except Killed:
                    assert work(store, [pool["control"]]) == want
                    assert not inventory.look(store).strays
                else:
                    break
            if not gc.decide(inventory.look(store), recorded.records(store, 0), ORPHANS, time.time()).drops:
                break
            collect(store, ORPHANS)
        assert set(inventory.look(store).stages) == recorded.records(store)[0].folders
