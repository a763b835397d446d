"""Hydra's sweepers over our launcher: what they get back, what callbacks hear, and that one sweep is one study.

The stages are fakes of milliseconds; everything between the command line and them is real.
"""

from __future__ import annotations

import json
import logging
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.study import fakes
from zexp import cli
from zexp.study.launch import machine

ROOT = Path(__file__).parents[2]
LR = "schedule.peak_lr"


class Folder:
    """A user's folder with a text of its own, and the command line in it."""

    def __init__(self, path: Path, record: Path) -> None:
        self.path, self._record = path, record
        texts = "corpus.sources={base:{kind:text,view:null,files:a.txt},high_quality:{kind:text,view:null,files:a.txt,max_bytes:100K}}"
        self.fixed = [
            texts, "mix.sources.base.max_epochs=null", "anneal=none", "eval=bpb",
            "seq_len=64", "phases.pretrain.tokens=8K", "phases.pretrain.batch_tokens=512", "schedule=constant",
            "schedule.warmup_tokens=1K", "+hydra.launcher.preload=[]",
            f"+hydra.launcher.handlers={fakes.HANDLERS}", "+hydra.callbacks.r._target_=tests.study.fakes.Recorder",
        ]  # fmt: skip

    def zexp(self, verb: str, *words: str) -> int:
        metric = [] if any(word.startswith("study.metric=") for word in words) else [f"study.metric={fakes.METRIC}"]
        return cli.main([verb, *words, *self.fixed, *metric])

    def heard(self, *whats: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self._record.read_text().splitlines()]
        return [line for line in lines if not whats or line["what"] in whats]

    def study(self) -> dict[str, Any]:
        (found,) = (self.path / "store" / "studies").iterdir()
        return json.loads((found / "variants.json").read_text()) | {"folder": found}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    (tmp_path / "a.txt").write_text("A sentence with some words in it.\n\n" * 5000)
    record = tmp_path / "record.jsonl"
    record.touch()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RECORD", str(record))
    monkeypatch.delenv("ZEXP_STORE", raising=False)
    monkeypatch.setattr(machine, "core_numbers", lambda: [0, 1])
    monkeypatch.chdir(tmp_path)
    logging.getLogger("optuna").handlers = [logging.NullHandler()]  # its own one writes to a stream that pytest closes
    return Folder(tmp_path, record)


def test_a_grid_of_basic_returns_each_job_in_order_and_a_failed_one_loses_no_sibling(folder, capsys):
    assert folder.zexp("run", "-m", "hydra/sweeper=basic", f"{LR}=0.015,0.001,0.03", "seed=0,1") == 1
    ends = folder.heard("job end")
    assert [(line["num"], line["hydra_num"], line["lr"]) for line in ends] == [
        (n, n, lr) for n, lr in enumerate([0.015, 0.015, 0.001, 0.001, 0.03, 0.03])
    ]
    assert [line["status"] for line in ends] == ["FAILED"] * 2 + ["COMPLETED"] * 4
    assert [line["value"] for line in ends[2:]] == [str(fakes.score(0.001))] * 2 + ["inf"] * 2
    assert "has no result" in ends[0]["value"]
    assert all(f"{LR}={line['lr']}" in line["overrides"] and not line["has_hydra"] for line in ends)
    assert {(line["task"], line["directory"]) for line in ends} == {("hydra_app", str(folder.path))}, "as Hydra names its jobs: by the module"
    assert "Error executing job with overrides" in capsys.readouterr().err


def test_callbacks_are_called_as_by_hydra_all_starts_before_the_first_stage(folder):
    assert folder.zexp("run", "-m", f"{LR}=0.001,0.002") == 0
    heard = folder.heard()
    assert [line["what"] for line in heard] == [
        "multirun start", "job start", "job start", "job end", "job end", "multirun end",
    ]  # fmt: skip
    assert [line["num"] for line in folder.heard("job start")] == [0, 1]
    assert [line["started"] for line in heard] == [False] * 3 + [True] * 3
    for line, lr in zip(folder.heard("job start"), ("0.001", "0.002"), strict=True):
        assert f"{LR}={lr}" in line["overrides"] and f"{LR}={lr}" in line["dirname"]
    assert folder.zexp("run", f"{LR}=0.001") == 0
    assert [line["what"] for line in folder.heard()[6:]] == ["run start", "job start", "job end", "run end"]


def test_a_study_that_is_complete_answers_without_importing_what_trains(folder):
    assert folder.zexp("run", "-m", f"{LR}=0.001,0.002") == 0
    heavy = ("torch", "submitit", "lm_eval", "datasets", "polars", "scipy.stats", "optuna", "wandb", "matplotlib", "mpld3")
    words = ["run", "-m", f"{LR}=0.001,0.002", *folder.fixed, f"study.metric={fakes.METRIC}"]
    code = f"import sys; from zexp import cli; cli.main({words!r}); print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "Nothing to train: everything was in the store" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_wrong_request_starts_no_job(folder):
    assert folder.zexp("run", "-m", f"{LR}=0.001,-1") == 2
    assert [line["what"] for line in folder.heard()] == ["multirun start"]


def test_batches_of_one_sweep_are_one_study_without_revisions(folder):
    assert folder.zexp("run", "-m", "hydra/sweeper=basic", "hydra.sweeper.max_batch_size=2", f"{LR}=1e-3,2e-3,3e-3", "study.name=lr") == 0
    study = folder.study()
    assert [variant["name"] for variant in study["variants"]] == ["peak_lr=0.001", "peak_lr=0.002", "peak_lr=0.003"]
    assert study["study"]["revision"] == 1 and not (study["folder"] / "revisions").exists()
    assert [line["num"] for line in folder.heard("job end")] == [0, 1, 2]
    assert not list(folder.path.glob("*.yaml")), "Hydra's own file lies in the store"
    assert (folder.path / "store" / "hydra" / "multirun.yaml").is_file()


def test_plan_shows_the_first_batch_and_starts_nothing(folder, capsys):
    pytest.importorskip("optuna")
    assert folder.zexp("plan", "--json", "-m", "hydra/sweeper=optuna", f"{LR}=interval(1e-4,5e-3)", "hydra.sweeper.n_jobs=3") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["variants"] == 3 and "the first batch" in said.err
    assert not folder.heard("job start") and not (folder.path / "store" / "started").exists()


def test_ten_trials_of_optuna_a_diverged_one_is_the_worst_and_a_failed_one_is_failed(folder):
    optuna = pytest.importorskip("optuna")
    storage = f"sqlite:///{folder.path}/optuna.db"
    code = folder.zexp(
        "run", "-m", "hydra/sweeper=optuna", f"{LR}=tag(log,interval(1e-4,1e-1))", "hydra.sweeper.n_trials=10",
        "hydra.sweeper.n_jobs=2", "hydra.sweeper.sampler.seed=3", f"hydra.sweeper.storage={storage}", "hydra.sweeper.study_name=lr",
        "hydra.sweeper.max_failure_rate=1.0",
    )  # fmt: skip
    trials = optuna.load_study(study_name="lr", storage=storage).trials
    assert len(trials) == 10 and code == 1
    for trial in trials:
        peak = trial.params[LR]
        if fakes.FAILS <= peak < fakes.DIVERGES:
            assert trial.state.name == "FAIL" and trial.value is None
        else:
            assert trial.state.name == "COMPLETE"
            assert trial.value == (math.inf if peak >= fakes.DIVERGES else pytest.approx(fakes.score(peak)))
    assert {trial.state.name for trial in trials} == {"FAIL", "COMPLETE"}, "the seed gives both"
    assert any(trial.value == math.inf for trial in trials)
    study = folder.study()
    assert len(study["variants"]) == len({trial.params[LR] for trial in trials})
    assert study["study"]["revision"] == 1
    names = [variant["name"] for variant in study["variants"]]
    assert all(len(name) <= len("peak_lr=0.0001234") for name in names) and len(set(names)) == len(names)
    assert [line["num"] for line in folder.heard("job end")] == list(range(10))


def test_a_maximised_metric_of_a_diverged_trial_is_minus_infinity(folder):
    optuna = pytest.importorskip("optuna")
    storage = f"sqlite:///{folder.path}/optuna.db"
    folder.fixed.pop()  # without callbacks, for which a folder of the job would be made
    words = ["hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2"]
    assert folder.zexp("run", "-m", *words, f"{LR}=choice(0.03)", f"hydra.sweeper.storage={storage}", "hydra.sweeper.study_name=a") == 1
    assert [trial.value for trial in optuna.load_study(study_name="a", storage=storage).trials] == [-math.inf] * 2
    assert len(folder.study()["variants"]) == 1, "the same point twice is one variant"
    assert (folder.path / "store" / "hydra" / "optimization_results.yaml").is_file()


def test_failures_beyond_the_rate_that_the_sweeper_allows_end_it(folder, capsys):
    pytest.importorskip("optuna")
    words = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=1", f"{LR}=interval(0.011,0.019)"]
    assert folder.zexp("run", "-m", *words) == 1
    assert len(folder.heard("job end")) == 1
    assert "has no result" in capsys.readouterr().err
    assert folder.zexp("run", "-m", *words, "hydra.sweeper.max_failure_rate=1.0") == 1
    assert "every trial failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["study.metric=null"], "study.metric is not set"),
        (["hydra.sweeper.direction=[minimize,maximize]"], "study.metric is one number"),
        (["study.seeds=[0,1]"], "study.seeds: hydra/sweeper=optuna makes its own points"),
    ],
)
def test_what_optuna_cannot_do_is_refused(folder, capsys, words, says):
    pytest.importorskip("optuna")
    assert folder.zexp("run", "-m", "hydra/sweeper=optuna", f"{LR}=interval(1e-4,1e-3)", *words) == 2
    assert says in capsys.readouterr().err


def test_options_of_another_sweeper_say_how_to_choose_it(folder, capsys):
    assert folder.zexp("plan", "-m", "+hydra.sweeper.n_trials=3", f"{LR}=0.001,0.002") == 2
    assert "hydra.sweeper.n_trials: zexp's own sweeper has no options" in capsys.readouterr().err


def test_the_optuna_study_of_the_page_is_planned(folder, capsys):
    pytest.importorskip("optuna")
    (study,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/sweepers.md").read_text(), re.DOTALL)
    (folder.path / "conf" / "sweeps").mkdir(parents=True)
    (folder.path / "conf" / "sweeps" / "peak.yaml").write_text(study)
    assert cli.main(["plan", "--json", "+sweeps=peak", "hydra/sweeper=optuna"]) == 0
    assert json.loads(capsys.readouterr().out)["variants"] == 2


def test_a_sweeper_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    from hydra.errors import MissingConfigException

    from zexp.hydra_app import _cause

    assert "pip install 'zexp[optuna]'" in _cause(MissingConfigException("Could not find 'hydra/sweeper/optuna'", "x"))
