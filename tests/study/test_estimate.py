"""How long a plan takes and what it needs: measured speeds of the same shape, stated ones else, and what cannot fit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from typing import Any

import pytest

from tests.study.test_plan import directory, planned  # noqa: F401  # a fixture
from zexp.calc import devices, memory
from zexp.calc.layout import Layout
from zexp.config.errors import ConfigError
from zexp.store import files
from zexp.store.folder import Store
from zexp.study import estimate, fits, outlook, queue
from zexp.study.catalogue import Catalogue
from zexp.study.launch import machine
from zexp.study.launch.base import Stage as Launched
from zexp.study.launch.options import LocalOptions
from zexp.study.launch.scheduler import Schedule
from zexp.study.measured import Measured
from zexp.study.show import say_bytes
from zexp.study.simulate import simulate

H100 = queue.Queue(
    backend="local", slots=8, threads=1, device="cuda", model="NVIDIA H100 80GB HBM3", memory=80 * 10**9, available=80 * 10**9
)
CPU = queue.Queue(backend="local", slots=2, threads=1, device="cpu", model="Some CPU", memory=10**10, available=10**10)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", patience=0)


def trained(store: Store, stage: Any, *speeds: float, device: str = "Some CPU", request: dict[str, Any] | None = None) -> None:
    """An attempt at a planned segment that logged these speeds and ended, on a device."""
    folder = store.folder("trajectory", stage.full_id)
    folder.create(stage.semantic, {})
    attempt = folder.path / "attempts" / str(len(folder.attempts()) + 1)
    attempt.mkdir(parents=True)
    files.write_yaml(attempt / "request.yaml", {**stage.request, **(request or {})})
    lines = [{"tokens": n + 1, "tokens_per_second": speed} for n, speed in enumerate(speeds)]
    (attempt / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = folder.path / "states" / str(stage.to)
    if not state.exists():
        state.mkdir(parents=True)
        interval = {"from": 0, "to": stage.to, "fingerprint": "f"}
        files.write_json(state / "state.json", {"fingerprints": [interval], "fingerprint_details": {"f": {"device": device}}})
        files.write_manifest(state)


def root_of(plan):
    return next(s for s in plan.stages.values() if s.kind == "segment" and s.semantic["parent"] is None)


def estimated(plan, store: Store, on: queue.Queue = CPU):
    return estimate.estimates(plan, Measured(Catalogue(store), on.model), on)


def test_a_training_takes_what_earlier_ones_of_its_shape_took(directory, store):  # noqa: F811
    before = planned(directory, ("anneal=none", "seeds.init=5"), store=store)
    trained(store, root_of(before), 1.0, 2.0, 3.0, 100.0, 200.0, 300.0)
    plan = planned(directory, ("anneal=none",), store=store)
    root = root_of(plan)
    found = estimated(plan, store)[root.id]
    assert found.source == "measured"
    assert found.seconds == pytest.approx(root.to / 200.0 + estimate.SEGMENT_SECONDS), "the first half is warming up"
    assert root_of(before).full_id[:16] in found.basis and "200 tokens/s, 1 attempt of this shape" in found.basis


@pytest.mark.parametrize(
    "other", ["execution.micro_batch=2", "parallelism.threads=2", "seq_len=128", "precision=bf16", "arch.width=64"]
)
def test_a_training_of_another_shape_says_nothing(directory, store, other):  # noqa: F811
    trained(store, root_of(planned(directory, ("anneal=none", other), store=store)), 100.0)
    plan = planned(directory, ("anneal=none",), store=store)
    assert estimated(plan, store)[root_of(plan).id].source == "calculated"


def test_only_the_device_that_is_planned_for_counts(directory, store):  # noqa: F811
    trained(store, root_of(planned(directory, ("anneal=none", "seeds.init=5"), store=store)), 100.0, device="NVIDIA H100 80GB HBM3")
    plan = planned(directory, ("anneal=none",), store=store)
    root = root_of(plan)
    named = dataclasses.replace(H100, model="h100", stated=True)
    unknown = dataclasses.replace(H100, model=None)
    sources = {on.model: estimated(plan, store, on)[root.id].source for on in (CPU, H100, named, unknown)}
    assert sources == {"Some CPU": "calculated", "NVIDIA H100 80GB HBM3": "measured", "h100": "measured", None: "measured"}


def test_what_is_calculated_is_flops_over_the_stated_speed(directory, store):  # noqa: F811
    plan = planned(directory, ("anneal=none", "precision=bf16", "parallelism.threads=4"), store=store)
    root = root_of(plan)
    flops = root.to * root.flops_per_token
    on_gpu = estimated(plan, store, H100)[root.id]
    assert on_gpu.seconds == pytest.approx(flops / (0.35 * 989.4e12) + estimate.SEGMENT_SECONDS)
    assert on_gpu.basis == "35% MFU of h100 in bf16"
    on_cpu = estimated(plan, store)[root.id]
    assert on_cpu.seconds == pytest.approx(flops / (4 * estimate.CORE_FLOPS) + estimate.SEGMENT_SECONDS)


def test_of_a_device_that_is_not_known_there_is_no_time_but_an_order(directory, store):  # noqa: F811
    plan = planned(directory, ("anneal=none",), store=store)
    on = dataclasses.replace(H100, model="NVIDIA GB999", memory=None, available=None)
    found = estimated(plan, store, on)
    root = found[root_of(plan).id]
    assert root.seconds is None and root.source == "unknown" and "NVIDIA GB999" in root.basis
    costs = {id: estimate.cost(plan.stages[id], one) for id, one in found.items()}
    decay = next(s for s in plan.stages.values() if s.label.endswith("decay"))
    assert costs[root_of(plan).id] > costs[decay.id] > 0
    assert fits.warnings(fits.needs(plan, on), on) == []
    fits.check(fits.needs(plan, on), on)


def test_an_evaluation_takes_what_the_same_task_took_on_the_same_model(directory, store):  # noqa: F811
    before = planned(directory, ("anneal=none", "seeds.init=5"), store=store)
    for stage in before.stages.values():
        if stage.kind == "segment":
            trained(store, stage, 100.0)
        if stage.kind == "eval":
            folder = store.folder("eval", stage.full_id)
            folder.create(stage.semantic, {})
            (folder.path / "result").mkdir()
            files.write_json(folder.path / "result" / "results.json", {"seconds": 7.5, "device": "Some CPU", "threads": 1})
            files.write_manifest(folder.path / "result")
    plan = planned(directory, ("anneal=none",), store=store)
    evals = [s for s in plan.to_do if s.kind == "eval"]
    found = estimated(plan, store)
    assert evals and all((found[s.id].source, found[s.id].seconds) == ("measured", 7.5) for s in evals)
    other = planned(directory, ("anneal=none", "eval.limit=3"), store=store)
    found = estimated(other, store)
    assert {found[s.id].source for s in other.to_do if s.kind == "eval"} == {"calculated"}


def test_data_takes_what_data_took(directory, store):  # noqa: F811
    before = planned(directory, ("anneal=none", "corpus.seed=1"), store=store)
    corpus = next(s for s in before.stages.values() if s.kind == "corpus")
    folder = store.folder("corpus", corpus.full_id)
    folder.create(corpus.semantic, {})
    (folder.path / "result").mkdir()
    files.write_manifest(folder.path / "result")
    attempt = folder.path / "attempts" / "1"
    attempt.mkdir(parents=True)
    files.write_yaml(attempt / "request.yaml", {})
    began = (attempt / "request.yaml").stat().st_mtime
    files.write_json(attempt / "progress.json", {"done": 1000, "total": 1000, "unit": "bytes", "time": began + 2})
    plan = planned(directory, ("anneal=none",), store=store)
    again = next(s for s in plan.to_do if s.kind == "corpus")
    found = estimated(plan, store)
    assert found[again.id].source == "measured"
    assert found[again.id].seconds == pytest.approx(again.tokens_bound / 500, rel=1e-3)
    assert all(found[s.id].source == "calculated" for s in plan.to_do if s.kind == "packing")


# The simulation


def test_the_longest_path_goes_first():
    seconds = {"short": 1.0, "long": 1.0, "after": 10.0}
    parents: dict[str, list[str]] = {"short": [], "long": [], "after": ["long", "elsewhere"]}
    found = simulate(seconds, parents, 1)
    assert found.seconds == 12.0 and found.chain == ["long", "after"] and found.chain_seconds == 11.0
    assert simulate(seconds, parents, None).seconds == 11.0, "no number of slots undercuts the longest chain"
    assert simulate({}, {}, 2).seconds == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_a_simulation_ends_when_the_launchers_own_schedule_does(seed):
    draw = random.Random(seed)
    names = [f"s{n}" for n in range(draw.randint(1, 25))]
    parents = {name: [p for p in names[:n] if draw.random() < 0.15] for n, name in enumerate(names)}
    seconds = {name: draw.uniform(3.0, 50.0) for name in names}  # too long to share a job
    slots = draw.randint(1, 4)
    schedule = Schedule([Launched(id=n, kind="segment", folder=f"trajectory/{n}", parents=parents[n], cost=seconds[n]) for n in names])
    now, running = 0.0, []
    while not schedule.finished:
        for job in schedule.jobs(slots - len(running)):
            schedule.start(job)
            running += [(now + stage.cost, stage.id) for stage in job.stages]
        now, ended = min(running)
        running.remove((now, ended))
        schedule.end(ended, done=True)
    assert simulate(seconds, parents, slots).seconds == pytest.approx(now)


def test_more_slots_take_no_longer_than_the_bounds_of_list_scheduling():
    draw = random.Random(0)
    names = [f"s{n}" for n in range(60)]
    parents = {name: [p for p in names[:n] if draw.random() < 0.05] for n, name in enumerate(names)}
    seconds = {name: draw.uniform(1, 9) for name in names}
    for slots in (1, 2, 5):
        found = simulate(seconds, parents, slots)
        work = sum(seconds.values())
        assert max(found.chain_seconds, work / slots) <= found.seconds <= found.chain_seconds + work / slots
    assert all(p in parents[c] for p, c in itertools.pairwise(simulate(seconds, parents, 2).chain))


# The whole


def looked(plan, store, monkeypatch, ram: machine.Memory | None = None, **options):
    monkeypatch.setattr(machine, "gpus", lambda environ=None: [])
    monkeypatch.setattr(machine, "core_numbers", lambda: [0, 1])
    monkeypatch.setattr(machine, "memory", lambda: ram or machine.Memory(10**10, 10**10))
    return outlook.outlook(plan, store, LocalOptions(**options), "study")


def test_the_outlook_says_time_hours_and_where_they_come_from(directory, store, monkeypatch):  # noqa: F811
    plan = planned(directory, ("anneal=none",), ("anneal=none", "seed=1"), store=store)
    ahead = looked(plan, store, monkeypatch)
    said = json.loads(json.dumps(ahead.to_json()))
    seconds = [one.seconds for one in ahead.estimates.values()]
    assert said["device_hours"] == pytest.approx(sum(seconds) / 3600)
    assert max(said["estimate"]["chain_seconds"], sum(seconds) / 2) <= said["seconds"] + 1e-2 <= sum(seconds) + 1e-2
    assert said["estimate"]["calculated"] == len(plan.to_do) and said["queue"]["slots"] == 2
    assert "on 2 slots" in ahead.lines()[0] and "the rest calculated at 30 GFLOP/s a core" in ahead.lines()[0]
    one = looked(plan, store, monkeypatch, slots=1)
    assert one.to_json()["seconds"] == pytest.approx(sum(seconds), abs=1e-3)
    assert ahead.costs == {id: e.seconds for id, e in ahead.estimates.items()}


def test_a_plan_with_nothing_to_do_says_nothing(directory, store, monkeypatch):  # noqa: F811
    plan = planned(directory, ("anneal=none",), store=store)
    for stage in plan.stages.values():
        stage.needed = False
    assert looked(plan, store, monkeypatch).lines() == []


def test_what_cannot_fit_is_refused_all_at_once(directory, store, monkeypatch):  # noqa: F811
    plan = planned(directory, ("anneal=none",), ("anneal=none", "arch.width=64"), store=store)
    with pytest.raises(ConfigError) as caught:
        looked(plan, store, monkeypatch, machine.Memory(10**6, 10**6))
    assert len(caught.value.problems) == 2
    assert all("weights, gradients and optimizer alone take" in text and "has 1 MB" in text for text in caught.value.problems)
    for stage in plan.stages.values():
        stage.needed = False
    assert looked(plan, store, monkeypatch, machine.Memory(10**6, 10**6)).needs == [], "what is in the store needs no memory"


def test_what_is_close_is_warned_of_with_what_would_help(directory, store, monkeypatch):  # noqa: F811
    plan = planned(directory, ("anneal=none",), store=store)
    (need,) = looked(plan, store, monkeypatch).needs
    total, fixed = need.training.total, need.training.total - need.training.activations
    assert fixed < total
    assert looked(plan, store, monkeypatch, machine.Memory(10**10, int(total / 0.89))).warnings() == []
    (text,) = looked(plan, store, monkeypatch, machine.Memory(10**10, int(total / 0.91))).warnings()
    assert "may run out of memory" in text and "execution.micro_batch=2 would take" in text
    full = memory.training(
        need.variant.model, Layout(checkpointing="full"), seq_len=need.variant.run.seq_len,
        micro_batch=need.variant.run.execution.micro_batch, precision=need.variant.run.precision,
    )  # fmt: skip
    assert f"parallelism.activation_checkpointing=full would take {say_bytes(full.total)}" in text


@pytest.mark.parametrize(("setting", "device", "less"), [("auto", "cuda", True), ("auto", "cpu", False), ("none", "cuda", False), ("full", "cpu", True)])
def test_a_plan_counts_the_memory_that_the_training_will_choose(directory, store, setting, device, less):  # noqa: F811
    plan = planned(directory, ("anneal=none", f"parallelism.activation_checkpointing={setting}"), store=store)
    (all_kept,) = fits.needs(planned(directory, ("anneal=none", "parallelism.activation_checkpointing=none"), store=store), queue_of(device))
    total = all_kept.training.total
    (found,) = fits.needs(plan, queue_of(device, int(total / 0.91)))
    assert (found.training.total < total) == less
    (found,) = fits.needs(plan, queue_of(device, int(total / 0.89)))
    assert (found.training.total < total) == (setting == "full")


def queue_of(device: str, room: int | None = None) -> queue.Queue:
    return queue.Queue(backend="local", slots=1, threads=1, device=device, model=None, memory=room, available=room)


def test_memory_is_shared_by_the_trainings_that_run_at_once(directory, store, monkeypatch):  # noqa: F811
    one = planned(directory, ("anneal=none",), store=store)
    two = planned(directory, ("anneal=none",), ("anneal=none", "seed=1"), store=store)
    ram = machine.Memory(10**10, 8 * 10**9)
    assert looked(one, store, monkeypatch, ram).needs[0].room == 8 * 10**9
    assert looked(two, store, monkeypatch, ram).needs[0].room == 4 * 10**9
    assert looked(two, store, monkeypatch, ram, slots=1).needs[0].room == 8 * 10**9


def test_a_plan_can_be_made_for_another_machines_device(directory, store, monkeypatch):  # noqa: F811
    wanted = ("anneal=none", "precision=bf16", "execution.device_model=h100")
    ahead = looked(planned(directory, wanted, store=store), store, monkeypatch, slots=8)
    assert (ahead.queue.slots, ahead.queue.memory, ahead.queue.key) == (8, 80 * 10**9, "h100")
    assert "GPU hours" in ahead.lines()[0] and "35% MFU of h100 in bf16" in ahead.lines()[0]
    for wrong, says in (
        (("execution.device_model=h10",), "no such device. There are: a10, a100"),
        (("execution.device_model=h100", "execution.device=cpu"), "contradict each other"),
    ):
        with pytest.raises(ConfigError, match=says):
            looked(planned(directory, ("anneal=none", *wrong), store=store), store, monkeypatch)


def test_the_names_of_vendors_tools_mean_devices_of_the_table():
    names = {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100_pcie", "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA A100-SXM4-40GB": "a100_40gb", "NVIDIA A100-PCIE-40GB": "a100_40gb", "NVIDIA A100 80GB PCIe": "a100",
        "NVIDIA H200": "h200", "NVIDIA GeForce RTX 4090": "rtx4090", "h100": "h100", "NVIDIA A10G": None,
        "NVIDIA H100 NVL": None, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    }  # fmt: skip
    assert {name: devices.named(name) for name in names} == names
    assert set(devices._NAMES.values()) == set(devices.DEVICES)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "1 s"), (89, "89 s"), (600, "10 min"), (11_400, "3 h 10 min"), (7200, "2 h"), (5 * 86_400, "5 d")]
)
def test_times_are_said_in_units_that_matter(seconds, said):
    assert outlook.say_seconds(seconds) == said
