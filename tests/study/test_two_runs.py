"""Whole commands beside each other: two runs of overlapping studies, a run in the background."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zexp.store.folder import Store
from zexp.study.launch import driver

WORDS = ["run", "-m", "arch=mine", "corpus=mine", "mix=mine", "eval=none", "anneal=control", "seq_len=128",
         "phases.pretrain.batch_tokens=1024", "schedule.warmup_tokens=1K", "anneal.tokens=4K", "anneal.warmup_tokens=0"]  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own with a small text, on a machine that no other test uses."""
    monkeypatch.setenv("ZEXP_SLOTS_DIR", str(tmp_path / "slots"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("ZEXP_STORE", raising=False)
    subprocess.run([sys.executable, "-m", "zexp.cli", "init", "mine"], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path / "mine"


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def run(*words: str, tokens: str = "16K") -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "zexp.cli", *WORDS, f"phases.pretrain.tokens={tokens}", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(subprocess.Popen(command, cwd=folder, text=True, **pipes))  # type: ignore[call-overload]
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()
    driver.stop(Store(folder / "store"), "mine")


def wait_for(what: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def said(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    return text


def test_overlapping_studies_started_together_train_each_shared_stage_once(folder, start):
    both = [start("study.name=one", "anneal.peak_fraction=0.75,0.25"), start("study.name=two", "anneal.peak_fraction=0.75,0.5")]
    texts = [said(process) for process in both]
    stages: dict[str, set[str]] = {}
    for name in ("one", "two"):
        planned = json.loads((folder / f"store/studies/{name}/variants.json").read_text())["stages"]
        for stage in planned:
            stages.setdefault(stage["folder"], set()).add(name)
        record = json.loads((folder / f"store/studies/{name}/driver.json").read_text())
        assert record["exit_code"] == 0
    shared = [path for path, names in stages.items() if len(names) == 2]
    assert len(shared) == 6, "tokenizer, corpus, packing, trunk, decay and the anneal that both have"
    for path in stages:
        assert os.listdir(folder / "store" / path / "attempts") == ["1"], path
    trained = sum(text.count(" started\n") for text in texts)
    assert trained == len(stages), "each stage was started by one of the two"


def test_a_run_in_the_background_goes_on_alone_and_a_second_one_finds_it(folder, start):
    store = Store(folder / "store")
    words = ("study.name=mine", "anneal.peak_fraction=0.75,0.25", "detach=true")
    began = time.monotonic()
    text = said(start(*words, tokens="96K"))
    assert time.monotonic() - began < 60
    record = driver.running(store, "mine")
    assert record is not None
    assert f"mine runs in the background: process {record['pid']}" in text
    assert "zexp status mine --watch" in text and "zexp cancel mine" in text
    assert os.getsid(record["pid"]) == record["pid"], "a session of its own"
    again = said(start(*words, tokens="96K"))
    assert f"mine runs already, since {record['time']}: process {record['pid']}" in again
    wait_for(lambda: any(path.exists() for path in folder.glob("store/trajectory/*/attempts/1/progress.json")))
    assert driver.stop(store, "mine")
    wait_for(lambda: driver.running(store, "mine") is None)
    log = Path(record["log"]).read_text()
    assert "a state (at most" in log and "Interrupted. The same command goes on from the last states." in log
    assert json.loads((folder / "store/studies/mine/driver.json").read_text())["exit_code"] == 130
    assert list(folder.glob("store/trajectory/*/states/*"))
    said(start(*words, tokens="96K"))
    wait_for(lambda: driver.running(store, "mine") is None)
    assert json.loads((folder / "store/studies/mine/driver.json").read_text())["exit_code"] == 0


def test_a_wrong_request_ends_at_once_instead_of_in_the_background(folder, start):
    for words in (["execution.device=cuda"], ["+hydra.launcher.slot=3"], ["hydra.launcher.gpus_per_stage=64"]):
        process = start("study.name=mine", "detach=true", *words)
        text, _ = process.communicate(timeout=60)
        assert process.returncode == 2, text
        assert "ConfigError" in text
    assert not (folder / "store/studies").exists()


def test_failures_stop_a_study_with_exit_code_1(folder, start):
    process = start(
        "study.name=mine", "anneal.peak_fraction=0.75,0.25", "hydra.launcher.max_failures=1",
        "+hydra.launcher.handlers={tokenizer: 'zexp.data.tokenizer:nothing'}",
    )  # fmt: skip
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 1, text
    assert "skipped 4 stages: stopped after 1 failure (hydra.launcher.max_failures)" in text, "training and annealing"
    assert "skipped 2 stages that need one of those above" in text, "the corpus and its packing"
