"""What evaluations load from the hub is fetched before jobs are submitted. A folder of Parquet stands for the hub's."""

from __future__ import annotations

import json
from pathlib import Path

import polars
import pytest

from tests.test_cli import zexp
from zexp.config.errors import ConfigError
from zexp.evaluate.fetch import loads
from zexp.store.folder import Store
from zexp.study import hub

YAML = """\
task: far
dataset_path: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: [" yes", " no"]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


def task(path: str) -> dict[str, object]:
    return {"name": "far", "yaml": {"task": "far", "dataset_path": path, "test_split": "test", "output_type": "multiple_choice",
            "doc_to_text": "{{question}}", "doc_to_target": 0, "doc_to_choice": [" yes", " no"]}}  # fmt: skip


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "far_away"
    (folder / "data").mkdir(parents=True)
    polars.DataFrame({"question": [f"is {n} a number?" for n in range(8)]}).write_parquet(folder / "data/test-0.parquet")
    return folder


def test_local_files_and_documents_of_the_plan_are_not_fetched():
    assert loads({"task": {"yaml": None}, "tasks": None})
    assert loads({"task": {"yaml": {"dataset_path": "org/name"}}, "tasks": None})
    assert not loads({"task": {"yaml": {"dataset_path": "json"}}, "tasks": None})
    assert not loads({"task": {"yaml": {"dataset_path": "org/name"}}, "tasks": "made by a stage"})


def test_what_is_fetched_is_in_the_store_and_is_not_fetched_again(tmp_path, dataset, monkeypatch, capsys):
    monkeypatch.delenv("HF_HOME", raising=False)
    store = Store(tmp_path / "store")
    wanted = [{"task": task(str(dataset)), "request": {"yaml": str(tmp_path / "far.yaml"), "directory": str(tmp_path)}}]
    hub.fetch(wanted, store)
    assert "Fetching the data of far" in capsys.readouterr().out
    assert list((store.root / "hub").rglob("*.arrow")), "datasets keeps what it has loaded"
    assert len(list((store.root / "hub/zexp-fetched").iterdir())) == 1


def test_what_cannot_be_fetched_is_refused_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    store = Store(tmp_path / "store")
    wanted = [{"task": task("nobody/nothing"), "request": {"yaml": str(tmp_path / "far.yaml"), "directory": str(tmp_path)}}]
    with pytest.raises(ConfigError, match=r"the data of far could not be fetched: .*\n.*hydra.launcher.offline=false"):
        hub.fetch(wanted, store)
    assert not (store.root / "hub/zexp-fetched").exists()


def test_plan_says_what_would_be_fetched(tmp_path, dataset):
    assert zexp("init", "mine", cwd=tmp_path).returncode == 0
    (tmp_path / "mine/evals").mkdir()
    (tmp_path / "mine/evals/far.yaml").write_text(YAML.format(path=dataset))
    words = ["+sweeps=mine", "eval.tasks=[far]", "study.metric=null", "hydra/launcher=slurm"]
    done = zexp("plan", "--json", *words, cwd=tmp_path / "mine", HF_HOME="")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fetch"] == ["far"]
    assert "To be fetched from the hub before anything is submitted: far." in zexp("plan", *words, cwd=tmp_path / "mine").stdout
    assert json.loads(zexp("plan", "--json", *words[:-1], cwd=tmp_path / "mine").stdout)["fetch"] == []
