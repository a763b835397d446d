import json
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zexp.store import retention
from zexp.store.errors import LeaseLost
from zexp.store.retention import prune, rolling_states, superfluous

COUNTS = st.sets(st.integers(0, 20))


@given(COUNTS, COUNTS, st.integers(0, 4))
def test_the_newest_and_the_named_stay_and_all_others_go(rolling, named, newest):
    gone = superfluous(rolling, named, newest=newest)
    stays = rolling - set(gone)
    assert gone == sorted(gone)
    assert set(gone) <= rolling and not named & set(gone)
    assert set(sorted(rolling)[len(rolling) - min(newest, len(rolling)) :]) <= stays
    assert all(tokens in named or sum(other > tokens for other in rolling) < newest for tokens in stays)


def test_two_rolling_states_and_the_named_ones_stay():
    assert superfluous([10, 20, 30, 40, 50], {20}) == [10, 30]
    assert superfluous([10, 20], set()) == []
    with pytest.raises(ValueError):
        superfluous([1], [], newest=-1)


def save(attempt, tokens, *, rolling):
    scratch = attempt.scratch("state")
    (scratch / "weights").write_text("1")
    assert attempt.publish(scratch, f"states/{tokens}", rolling=rolling)


def test_only_rolling_states_are_deleted(make):
    folder = make("trajectory")
    with folder.attempt({}) as attempt:
        for tokens in (10, 20, 30, 40, 50, 60):
            save(attempt, tokens, rolling=tokens not in (20, 60))
        assert rolling_states(folder) == [10, 30, 40, 50]
        assert prune(attempt, keep=[30]) == [10]
        assert prune(attempt, keep=[30]) == []
        assert folder.states() == [20, 30, 40, 50, 60]
        assert prune(attempt, keep=[], newest=0) == [30, 40, 50]
    assert folder.states() == [20, 60]
    assert not list(folder.path.glob("trash-*"))


def test_a_rolling_state_that_another_study_pinned_stays(make):
    folder = make("trajectory")
    folder.pin(10)
    folder.pin(10)
    folder.pin(99)
    assert folder.pins() == [10, 99]
    with folder.attempt({}) as attempt:
        for tokens in (10, 20, 30, 40):
            save(attempt, tokens, rolling=True)
        assert prune(attempt, keep=[]) == [20]
    assert folder.states() == [10, 30, 40]


def test_who_lost_the_lease_deletes_nothing(make):
    folder = make("trajectory")
    with pytest.raises(LeaseLost), folder.attempt({}) as attempt:
        for tokens in (10, 20, 30):
            save(attempt, tokens, rolling=True)
        (folder.path / "lease.2").touch()
        prune(attempt, keep=[])
    assert folder.states() == [10, 20, 30]


KILLED = """
import shutil
from zexp.store import retention
shutil.rmtree = die
with folder().attempt({}) as attempt:
    for tokens in (10, 20, 30):
        scratch = attempt.scratch("state")
        (scratch / "weights").write_text("1")
        attempt.publish(scratch, f"states/{tokens}", rolling=True)
    retention.prune(attempt, [])
"""


def test_what_a_killed_one_had_begun_to_delete_is_gone_and_the_next_one_clears_it(make, start):
    folder = make("trajectory")
    assert start(folder, KILLED).wait() == -signal.SIGKILL
    assert folder.states() == [20, 30]
    assert len(list(folder.path.glob("trash-*"))) == 1
    with folder.attempt({}) as attempt:
        assert retention.prune(attempt, []) == []
    assert not list(folder.path.glob("trash-*"))


def test_an_optimizer_that_the_manifest_does_not_call_droppable_stays(make):
    folder = make("trajectory")
    with folder.attempt({}) as attempt:
        for tokens, droppable in ((10, []), (20, ["optimizer"])):
            scratch = attempt.scratch("state")
            (scratch / "optimizer").mkdir()
            (scratch / "optimizer/x").write_text("1")
            (scratch / "manifest.json").write_text(json.dumps({"droppable": droppable}))
            attempt.publish(scratch, f"states/{tokens}")
    assert [retention.drop_optimizer(folder, tokens) for tokens in (10, 20)] == [False, True]
    for tokens in (10, 20):
        folder.verify(folder.state(tokens))
