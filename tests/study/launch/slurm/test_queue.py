"""Stages as units and arrays: every stage once, nothing before what it waits for, and as few arrays as the tree allows."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zexp.study.launch.base import Stage
from zexp.study.launch.slurm.options import CLASSES, Resources, Shape, SlurmOptions, shape_of
from zexp.study.launch.slurm.queue import Array, Unit, arrays_of, asks_for_success, units_of


def stage(id: str, *parents: str, kind: str = "segment", cost: float = 60.0, **request: object) -> Stage:
    return Stage(id=id, kind=kind, folder=f"{kind}/{id}", parents=parents, cost=cost, request={"threads": 1, **request})


def queued(stages: list[Stage], options: SlurmOptions | None = None, most: int = 1000) -> tuple[list[Unit], list[Array]]:
    options = options or SlurmOptions()
    resources = {name: options.resources(name) for name in set(CLASSES.values())}
    units = units_of(stages, {one.id: shape_of(one, options) for one in stages}, resources, {})
    return units, arrays_of(units, most)


def names(units: list[Unit], array: Array) -> list[str]:
    return ["+".join(one.id for one in units[number].stages) for number in array.units]


def test_children_of_one_state_are_one_array_behind_it():
    units, arrays = queued([stage("p"), *(stage(f"a{n}", "p") for n in range(3))])
    assert [names(units, array) for array in arrays] == [["p"], ["a0", "a1", "a2"]]
    assert arrays[1].waits == {0} and arrays[1].corresponds is None


def test_one_to_one_chains_follow_element_by_element():
    chain = [stage(f"{name}{n}", *([f"{before}{n}"] if before else [])) for name, before in (("a", ""), ("b", "a"), ("c", "b")) for n in range(3)]
    units, arrays = queued(chain)
    assert [names(units, array) for array in arrays] == [["a0", "a1", "a2"], ["b0", "b1", "b2"], ["c0", "c1", "c2"]]
    assert [array.corresponds for array in arrays] == [None, 0, 1]


def test_a_chain_follows_where_its_parents_are_although_they_were_ordered_by_length():
    stages = [stage("a0"), stage("a1", cost=600), stage("b0", "a0"), stage("b1", "a1", cost=600)]
    units, arrays = queued(stages)
    assert [names(units, array) for array in arrays] == [["a1", "a0"], ["b1", "b0"]]
    assert arrays[1].corresponds == 0


def test_several_children_of_each_of_several_states_are_as_few_arrays_as_can_be():
    stages = [stage(f"p{n}") for n in range(4)] + [stage(f"c{n}{m}", f"p{n}") for n in range(4) for m in range(2)]
    _units, arrays = queued(stages)
    assert [len(array.units) for array in arrays] == [4, 4, 4]
    assert {array.corresponds for array in arrays[1:]} == {0}


def test_a_state_without_a_successor_makes_its_siblings_arrays_of_their_own():
    units, arrays = queued([stage("a0"), stage("a1"), stage("b1", "a1")])
    assert arrays[1].corresponds is None and names(units, arrays[1]) == ["b1"]


def test_evaluations_of_one_state_share_a_job():
    stages = [stage("s"), *(stage(f"e{n}", "s", kind="eval", cost=2.0) for n in range(5))]
    units, arrays = queued(stages)
    assert [names(units, array) for array in arrays] == [["s"], ["e0+e1+e2+e3+e4"]]


def test_nothing_is_trained_before_all_data_is_there_and_a_failure_of_other_data_stops_nobody():
    stages = [
        stage("t", kind="tokenizer"), stage("c1", "t", kind="corpus"), stage("c2", "t", kind="corpus"),
        stage("s", "c1"), stage("q", "s"),
    ]  # fmt: skip
    units, _arrays = queued(stages)
    place = {units[number].stages[0].id: number for number in range(len(units))}
    training = units[place["s"]]
    assert training.parents == {place["c1"], place["c2"]}, "the tokenizer is above both"
    assert not asks_for_success(units[place["c2"]], training.shape)
    assert asks_for_success(units[place["t"]], units[place["c1"]].shape)
    assert asks_for_success(training, units[place["q"]].shape)


def test_short_data_is_one_job():
    options = SlurmOptions(data={"pack_minutes": 5})
    stages = [stage("t", kind="tokenizer", cost=5), stage("c", "t", kind="corpus", cost=5), stage("s", "c")]
    units, arrays = queued(stages, options)
    assert [names(units, array) for array in arrays] == [["t+c"], ["s"]]
    long = [stage("t", kind="tokenizer", cost=5), stage("c", "t", kind="corpus", cost=900), stage("s", "c")]
    assert len(queued(long, options)[1]) == 3


@pytest.mark.parametrize(("option", "jobs"), [({"stages_per_job": 4}, 3), ({"pack_minutes": 5}, 2), ({}, 10)])
def test_short_stages_share_a_job_when_asked(option, jobs):
    units, arrays = queued([stage(f"{n:02}") for n in range(10)], SlurmOptions(train=option))
    assert len(units) == jobs and len(arrays) == 1


def test_successors_of_a_job_of_several_stages_only_wait_for_its_end():
    stages = [*(stage(f"p{n}") for n in range(4)), *(stage(f"c{n}", f"p{n}") for n in range(4))]
    units, arrays = queued(stages, SlurmOptions(train={"stages_per_job": 2}))
    assert all(array.corresponds is None for array in arrays)
    assert not asks_for_success(units[0], units[-1].shape)


def test_arrays_are_split_at_the_clusters_limit_and_chains_with_them():
    stages = [stage(f"a{n}") for n in range(7)] + [stage(f"b{n}", f"a{n}") for n in range(7)]
    _units, arrays = queued(stages, most=3)
    assert [len(array.units) for array in arrays] == [3, 3, 1, 3, 3, 1]
    assert [array.corresponds for array in arrays] == [None, None, None, 0, 1, None]
    assert len(arrays[5].waits) == 1


def test_the_longest_chain_is_submitted_first_and_stands_first_in_its_array():
    stages = [stage("short", cost=5), stage("long", cost=50), stage("head of a chain", cost=1), stage("tail", "head of a chain", cost=90)]
    units, arrays = queued(stages)
    assert names(units, arrays[0]) == ["head of a chain", "long", "short"]


def test_other_shapes_are_other_arrays():
    stages = [stage("thin"), stage("wide", threads=4)]
    assert len(queued(stages)[1]) == 2
    shapes = {shape_of(one, SlurmOptions(cpus_per_task=2)) for one in stages}
    assert len(shapes) == 1, "what the user says replaces the threads"


def test_a_job_of_another_study_is_waited_for():
    one = stage("s")
    options = SlurmOptions()
    units = units_of([one], {"s": shape_of(one, options)}, dict.fromkeys(set(CLASSES.values()), Resources()), {"s": frozenset({"7_1"})})
    (array,) = arrays_of(units, 10)
    assert array.behind == {"7_1"}


KINDS = ("tokenizer", "corpus", "packing", "tasks", "segment", "eval")


@st.composite
def trees(draw: st.DrawFn) -> list[Stage]:
    """Stages in the order of a plan: data first, then segments, then evaluations."""
    stages: list[Stage] = []
    for number, kind in enumerate(sorted(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=30)), key=KINDS.index)):
        allowed = [s.id for s in stages if CLASSES[s.kind] == "data" or (CLASSES[kind] != "data" and s.kind == "segment")]
        parents = draw(st.lists(st.sampled_from(allowed), max_size=3, unique=True)) if allowed else []
        cost = draw(st.sampled_from([0.0, 1.0, 30.0, 400.0]))
        stages.append(stage(f"{number}", *parents, kind=kind, cost=cost, threads=draw(st.sampled_from([1, 1, 1, 2]))))
    return stages


options_drawn = st.builds(
    SlurmOptions,
    stages_per_job=st.sampled_from([None, 1, 3]),
    pack_minutes=st.sampled_from([0.0, 1.0, 10.0]),
    data=st.sampled_from([{}, {"pack_minutes": 100}]),
)


@given(trees(), options_drawn, st.integers(1, 5))
def test_whatever_the_tree_every_stage_runs_once_and_waits_for_its_parents(stages, options, most):
    units, arrays = queued(stages, options, most)
    assert Counter(s.id for unit in units for s in unit.stages) == Counter(s.id for s in stages)
    assert sorted(number for array in arrays for number in array.units) == list(range(len(units)))
    unit_of = {s.id: number for number, unit in enumerate(units) for s in unit.stages}
    place_of = {number: (place, turn) for place, array in enumerate(arrays) for turn, number in enumerate(array.units)}
    waits: dict[int, set[int]] = {}
    for place, array in enumerate(arrays):
        assert 1 <= len(array.units) <= most
        assert len({units[number].shape for number in array.units}) == 1
        for turn, number in enumerate(array.units):
            direct = {arrays[array.corresponds].units[turn]} if array.corresponds is not None else set(array.waits)
            assert all(place_of[parent][0] < place for parent in direct), "submitted before what it waits for"
            if array.corresponds is not None:
                assert len(arrays[array.corresponds].units) == len(array.units)
                assert all(asks_for_success(units[parent], units[number].shape) for parent in direct)
            waits[number] = direct.union(*(waits[parent] for parent in direct))
    data = {number for number, unit in enumerate(units) if unit.shape.kind == "data"}
    for number, unit in enumerate(units):
        before: set[str] = set()
        for one in unit.stages:
            above = {unit_of[p] for p in one.parents}
            assert above - {number} <= waits[number], "a parent is not waited for"
            assert all(p in before for p in one.parents if unit_of[p] == number), "a parent comes later in the same job"
            before.add(one.id)
        if unit.shape.kind != "data":
            assert data <= waits[number]


def test_a_shape_says_what_it_asks_for():
    options = SlurmOptions(partition="gpu", gpus_per_node=2, mem_gb=32, timeout_min=90, account="lab", additional_parameters={"exclusive": True})
    shape = shape_of(stage("s", threads=4), options)
    assert shape.line() == "1 node, 2 GPUs, 4 CPUs, 32 GB, at most 1 h 30 min in gpu"
    assert {"--partition=gpu", "--gpus-per-node=2", "--mem=32768M", "--time=90", "--account=lab", "--exclusive"} <= set(shape.arguments())
    assert isinstance(shape, Shape) and shape.parameters()["additional_parameters"] == {"exclusive": True}
