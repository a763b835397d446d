"""A plan's stages and Hydra's launcher node, handed to a launcher."""

from __future__ import annotations

import pytest

from zexp.config.errors import ConfigError
from zexp.study.launch import Outcome, options_of, run_stages
from zexp.study.plan import Stage


def stage(id: str, *parents: str) -> Stage:
    return Stage(id=id, kind="packing", full_id=id * 64, semantic={}, parents=list(parents))


def test_options_come_from_the_launcher_node():
    options = options_of({"backend": "local", "slots": 3, "grace_seconds": 5})
    assert (options.slots, options.grace_seconds, options.retries) == (3, 5, 0)


def test_every_wrong_option_is_named():
    with pytest.raises(ConfigError) as caught:
        options_of({"slots": 0, "grace_seconds": -1, "retries": -1, "backend": "cloud"})
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize("slots", ["two", True, 1.5])
def test_slots_of_a_wrong_type_are_refused(slots):
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.slots"):
        options_of({"slots": slots})


def test_a_misspelt_option_is_refused_with_the_ones_there_are():
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.slotz: there is no such key\. There are: .*slots"):
        options_of({"slotz": 3})


def test_what_needs_a_stage_that_failed_before_is_skipped(tmp_path):
    from zexp.store.folder import Store

    before = {"c": Outcome(status="failed")}
    outcomes = run_stages([stage("a", "c"), stage("b", "a")], Store(tmp_path), {}, before=before)
    assert {id: one.status for id, one in outcomes.items()} == {"a": "skipped", "b": "skipped"}


def test_nothing_starts_after_an_interruption(tmp_path):
    from zexp.store.folder import Store

    outcomes = run_stages([stage("a")], Store(tmp_path), {}, before={"c": Outcome(status="interrupted")})
    assert outcomes["a"].status == "interrupted"
