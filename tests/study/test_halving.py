"""Successive halving: its rungs and survivors, and a sweep over fake stages through the real command line."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.study.test_sweepers import LR, Folder, folder  # noqa: F401
from zexp.config.errors import ConfigError
from zexp.study import halving

AXIS = "phases.pretrain.tokens"
HALVE = ["hydra/sweeper=halving", "hydra.sweeper.direction=minimize", "hydra.sweeper.first=2K"]
RATES = "0.0001,0.0003,0.001,0.004,0.008,0.015,0.03"


@pytest.mark.parametrize(
    ("first", "factor", "count", "lengths"),
    [
        ("12.5%", 2, 8, [1000, 2000, 4000, 8000]), ("1K", 2, 2, [1000, 8000]), ("1K", 2, 3, [1000, 2000, 8000]),
        ("1K", 4, 16, [1000, 4000, 8000]), ("4K", 2, 100, [4000, 8000]),
    ],
)  # fmt: skip
def test_rungs_grow_by_the_factor_until_one_is_left_or_the_full_length_is_reached(first, factor, count, lengths):
    assert halving.rungs(first, factor, "8K", count, AXIS) == lengths


@given(st.lists(st.one_of(st.none(), st.floats()), min_size=1, max_size=40), st.integers(2, 5), st.sampled_from(halving.DIRECTIONS))
def test_survivors_are_the_best_of_those_that_have_a_score(scores, factor, direction):
    kept = halving.survivors(scores, factor, direction)
    good = [place for place, score in enumerate(scores) if score is not None and math.isfinite(score)]
    assert len(kept) == min(math.ceil(len(scores) / factor), len(good)) and set(kept) <= set(good) and kept == sorted(kept)
    sign = 1 if direction == "minimize" else -1
    lost = [sign * scores[place] for place in good if place not in kept]
    assert all(sign * scores[place] <= min(lost) for place in kept) if lost else True


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("9K", 2, "8K", 4), "begin with less"), (("1K", 1, "8K", 4), "factor = 1"), (("1K", 2, "8K", 1), "there is one"),
        (("x", 2, "8K", 4), "is no token count"),
    ],
)  # fmt: skip
def test_wrong_rungs_are_refused(values, words):
    with pytest.raises(ConfigError, match=f"(?i){words}"):
        halving.rungs(*values, AXIS)


def test_the_better_half_goes_on_from_where_it_stopped_and_all_are_one_study(folder: Folder, capsys) -> None:  # noqa: F811
    assert folder.zexp("run", "-m", *HALVE, f"{LR}={RATES}") == 1, "0.015 fails and 0.03 diverges"
    said = capsys.readouterr().out
    # 0.001 is best, then 0.0003 and 0.004 (equally far from it), 0.008, 0.0001.
    assert "Rung 1 of 3: 7 variants to 2 K tokens. 4 go on: peak_lr=0.0003, peak_lr=0.001, peak_lr=0.004, peak_lr=0.008." in said
    assert "Rung 2 of 3: 4 variants to 4 K tokens. 2 go on: " in said and "peak_lr=0.001" in said.split("Rung 2")[1]
    study = folder.study()
    assert study["study"]["revision"] == 1
    assert len(study["variants"]) == 7 + 4 + 2
    best = [
        (stage["from"], stage["to"])
        for stage in study["stages"]
        if stage["kind"] == "segment" and any(name.startswith("peak_lr=0.001,") for name in stage["variants"])
    ]
    assert best == [(0, 2048), (2048, 4096), (4096, 8192)], "a rung goes on from the one before"
    ends = [line["status"] for line in folder.heard("job end")]
    assert len(ends) == 13 and ends.count("FAILED") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hydra.sweeper.direction=null"], "hydra.sweeper.direction = None"),
        (["schedule=cosine"], "schedule.kind = 'cosine': each of its steps depends on the length"),
        (["hydra.sweeper.axis=seq_len"], "it is a phase's length"),
        (["hydra.sweeper.axis=phases.late.tokens"], "no phase 'late'"),
        (["hydra.sweeper.first=9K"], "Begin with less than that"),
    ],
)
def test_what_halving_cannot_do_is_refused(folder: Folder, capsys, words, said) -> None:  # noqa: F811
    keys = {word.partition("=")[0] for word in words}
    folder.fixed = [word for word in folder.fixed if word.partition("=")[0] not in keys]
    assert folder.zexp("run", "-m", *HALVE[:2], *words, f"{LR}=0.001,0.002") == 2
    assert said in capsys.readouterr().err


def test_in_the_background_a_sweep_goes_through_all_its_rungs(folder: Folder, capsys) -> None:  # noqa: F811
    began = time.monotonic()
    assert folder.zexp("run", "-m", *HALVE, f"{LR}=0.001,0.002,0.004", "detach=true", "study.name=away") == 0
    assert "away runs in the background" in capsys.readouterr().out
    log = folder.path / "store/studies/away/driver.log"
    while "Leaderboard" not in log.read_text():
        assert time.monotonic() - began < 60, log.read_text()
        time.sleep(0.2)
    assert "Rung 2 of 3: 2 variants to 4 K tokens. 1 go on: peak_lr=0.001." in log.read_text()
    assert len(folder.study()["variants"]) == 3 + 2 + 1
