"""The order of stages, without processes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zexp.study.launch.base import Stage
from zexp.study.launch.scheduler import EVAL_JOB_SECONDS, TINY_JOB_SECONDS, Job, Schedule, group


def stage(id: str, *parents: str, kind: str = "segment", cost: float = 0.0) -> Stage:
    return Stage(id=id, kind=kind, folder=f"{kind}/{id}", parents=parents, cost=cost)


def ids(jobs: list[Job]) -> list[list[str]]:
    return [[one.id for one in job.stages] for job in jobs]


def run_through(schedule: Schedule, slots: int, fails: set[str]) -> dict[str, str]:
    """Run everything, each round filling all slots; how each stage ended."""
    ended: dict[str, str] = {}
    while not schedule.finished:
        jobs = schedule.jobs(slots)
        assert jobs, "nothing runs and nothing can start"
        for job in jobs:
            schedule.start(job)
        for one in (one for job in jobs for one in job.stages):
            ended[one.id] = "failed" if one.id in fails else "done"
            for skipped in schedule.end(one.id, done=one.id not in fails):
                assert skipped.id not in ended
                ended[skipped.id] = "skipped"
    return ended


@st.composite
def trees(draw: st.DrawFn) -> list[Stage]:
    size = draw(st.integers(1, 14))
    found = []
    for n in range(size):
        parents = draw(st.lists(st.sampled_from(range(n)), max_size=2, unique=True)) if n else []
        kind = draw(st.sampled_from(["segment", "eval", "corpus"]))
        cost = draw(st.sampled_from([0.0, 0.5, 4.0, 20.0]))
        found.append(stage(str(n), *(str(p) for p in parents), kind=kind, cost=cost))
    return found


@given(trees(), st.integers(1, 4), st.sets(st.sampled_from([str(n) for n in range(14)])))
def test_every_stage_ends_once_and_exactly_the_descendants_of_failures_are_skipped(stages, slots, fails):
    ended = run_through(Schedule(stages), slots, fails)
    assert set(ended) == {one.id for one in stages}
    for one in stages:
        lost = any(ended[p] != "done" for p in one.parents)
        assert ended[one.id] == ("skipped" if lost else "failed" if one.id in fails else "done")


@given(trees(), st.integers(0, 6))
def test_grouping_keeps_every_stage_once_and_mixes_no_kinds(stages, idle):
    ready = [one for one in stages if not one.parents]
    jobs = group(ready, idle)
    assert sorted(one.id for job in jobs for one in job.stages) == sorted(one.id for one in ready)
    for job in jobs:
        assert len({one.kind for one in job.stages}) == 1
        assert len(job.stages) == 1 or job.stages[0].kind == "eval" or job.cost <= TINY_JOB_SECONDS


def test_the_longest_remaining_path_starts_first():
    schedule = Schedule(
        [stage("short", cost=9), stage("root", cost=1), stage("middle", "root", cost=1), stage("end", "middle", cost=8)]
    )
    assert [one.id for one in schedule.ready()] == ["root", "short"]
    assert schedule.rank == {"short": 9, "root": 10, "middle": 9, "end": 8}


def test_stages_without_estimates_keep_their_order():
    assert ids(Schedule([stage("a"), stage("b"), stage("c")]).jobs(2)) == [["a"], ["b"]]


def test_evals_of_one_state_share_a_job():
    schedule = Schedule([stage(f"{state}{n}", state, kind="eval") for state in ("s", "t") for n in range(3)])
    assert ids(schedule.jobs(2)) == [["s0", "s1", "s2"], ["t0", "t1", "t2"]]


def test_evals_of_one_state_are_spread_over_slots_that_would_be_idle():
    schedule = Schedule([stage(str(n), "state", kind="eval", cost=8) for n in range(4)])
    assert sorted(map(len, ids(schedule.jobs(2)))) == [2, 2]


def test_short_evals_of_one_state_stay_together_beside_an_idle_slot():
    schedule = Schedule([stage(str(n), "state", kind="eval", cost=2) for n in range(4)])
    assert ids(schedule.jobs(2)) == [["0", "1", "2", "3"]]


def test_evals_of_several_states_share_a_job_while_more_wait_than_slots_are_idle():
    evals = [stage(f"{state}{n}", f"state{state}", kind="eval", cost=4) for state in range(6) for n in range(3)]
    jobs = Schedule(evals).jobs(1)
    assert len(jobs) == 1
    assert [one.id[0] for one in jobs[0].stages] == ["0"] * 3 + ["1"] * 3
    assert jobs[0].cost <= EVAL_JOB_SECONDS


def test_tiny_stages_share_a_job_only_when_there_are_more_than_slots():
    tiny = [stage(str(n), kind="packing", cost=1.0) for n in range(4)]
    assert ids(group(tiny, 4)) == [["0"], ["1"], ["2"], ["3"]]
    assert sum(map(len, ids(group(tiny, 2)))) == 4 and len(group(tiny, 2)) == 2


def test_a_requeued_stage_is_ready_again():
    schedule = Schedule([stage("a"), stage("b", "a")])
    schedule.start(schedule.jobs(1)[0])
    assert schedule.ready() == []
    schedule.requeue("a")
    assert [one.id for one in schedule.ready()] == ["a"]


def test_a_parent_listed_after_its_child_is_refused():
    with pytest.raises(ValueError, match="b is listed before its parent a"):
        Schedule([stage("b", "a"), stage("a")])


def test_a_stage_listed_twice_is_refused():
    with pytest.raises(ValueError, match="a is listed twice"):
        Schedule([stage("a"), stage("a")])
