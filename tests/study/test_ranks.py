"""Layouts that a training can have are told from those that it cannot, at plan time, with the other mistakes."""

from __future__ import annotations

import json

import pytest

from tests import composed
from tests.study.test_plan import SMALL, TEXTS
from tests.test_cli import zexp
from zexp.config.errors import ConfigError
from zexp.store.folder import Store
from zexp.study import plan as plans
from zexp.study import ranks
from zexp.study.resolve import Composed, Resolver


def planned(tmp_path, *overrides, launcher="local"):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(TEXTS)
    caps = ["anneal.mix.sources.high_quality.max_epochs=null"]
    config = composed.config("anneal=replay60", *SMALL, *caps, *overrides)
    one = Composed(config, {"arch": "transformer_tiny", "anneal": "replay60"}, {}, list(overrides))
    store = Store(tmp_path / "store")
    return plans.build(Resolver(store.root, tmp_path, launcher).variants([one]), store)


def test_the_layout_is_in_the_request_of_a_training_and_in_no_id(tmp_path):
    alone, spread = planned(tmp_path), planned(tmp_path, "parallelism=two_nodes", "parallelism.data=4", launcher="slurm")
    assert set(alone.stages) == set(spread.stages)
    for stage in spread.stages.values():
        assert ranks.count(stage.request) == (4 if stage.kind == "segment" else 1)
    (asked, *_) = (stage.request["ranks"] for stage in spread.stages.values() if stage.kind == "segment")
    assert asked == {"data": 4, "nodes": 2, "timeout_seconds": 600.0}


@pytest.mark.parametrize(
    ("overrides", "launcher", "says"),
    [
        (["parallelism.data=4", "parallelism.nodes=2"], "local", ["parallelism.nodes = 2: the local launcher has this one machine"]),
        (["parallelism.data=3", "parallelism.nodes=2"], "slurm", ["parallelism.nodes = 2 does not divide parallelism.data = 3"]),
        (["parallelism.nodes=2"], "slurm", ["does not divide parallelism.data = 1", "Set parallelism.data to 2"]),
        (["parallelism.nodes=0"], "local", ["parallelism.nodes = 0: it must be at least 1"]),
        (["parallelism.timeout_seconds=inf"], "local", ["parallelism.timeout_seconds = inf must be a finite number"]),
        (
            ["parallelism.data=3"],
            "local",
            ["phases.pretrain.batch_tokens = 512 is 8 sequences of 64, which 3 ranks cannot share evenly",
             "Choose parallelism.data among 1, 2, 4, 8", "phases.pretrain.batch_tokens = 384 or 576"],
        ),
        (["parallelism.data=16"], "local", ["8 sequences of 64, which 16 ranks cannot share", "phases.pretrain.batch_tokens = 1024 (another"]),
        (["parallelism.data=4", "anneal.batch_tokens=384"], "local", ["anneal.batch_tokens = 384 is 6 sequences of 64"]),
        (["parallelism.data=2", "parallelism.zero=1"], "local", ["parallelism.zero = 1: a training does without it"]),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be_is_refused_with_what_to_choose(tmp_path, overrides, launcher, says):
    with pytest.raises(ConfigError) as error:
        planned(tmp_path, *overrides, launcher=launcher)
    for text in says:
        assert text in str(error.value)


def test_a_batch_that_is_its_parents_is_named_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        planned(tmp_path, "parallelism.data=3")
    assert len(error.value.problems) == 1


def test_layouts_are_refused_along_with_other_mistakes(tmp_path):
    done = zexp("plan", "parallelism=two_nodes", "parallelism.data=6", "execution.micro_batch=0", cwd=tmp_path)
    assert done.returncode == 2
    for text in ("hydra/launcher=slurm", "16 sequences of 256, which 6 ranks", "execution.micro_batch = 0", "3 problems"):
        assert text in done.stderr


@pytest.mark.dist
def test_a_study_whose_trainings_have_two_ranks_runs_on_this_machine(tmp_path):
    """The slots are as wide as a training; its log says who took part; the scores are those of any layout."""
    (tmp_path / "a.txt").write_text(TEXTS)
    (tmp_path / "b.txt").write_text(TEXTS)
    small = [word for word in SMALL if not word.startswith("anneal.")]
    words = [*small, "anneal=none", "execution.device=cpu", "phases.pretrain.tokens=4K", "schedule.warmup_tokens=512"]
    done = zexp("run", *words, "parallelism.data=2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    logs = sorted(tmp_path.glob("store/trajectory/*/attempts/1/log"))
    assert logs and all("2 ranks train together." in log.read_text() for log in logs)
    assert all((log.parent / "log.rank1").read_text() for log in logs)
    again = zexp("plan", "--json", *words, cwd=tmp_path)
    assert json.loads(again.stdout)["tokens"]["to_train"] == 0, "another layout has the same ids"
