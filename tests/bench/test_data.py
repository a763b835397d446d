"""The input pipeline: what has to be built first, and how fast batches and tokens come."""

import json

import pytest

from tests.bench.conftest import asked
from tests.test_cli import zexp
from zexp.bench import data
from zexp.config.errors import ConfigError

WORDS = ("arch=mine", "corpus=mine", "mix=mine", "eval=none", "seq_len=64", "anneal=control", "anneal.tokens=1024", "anneal.warmup_tokens=0")
SHORT = ("phases.pretrain.tokens=4096", "phases.pretrain.batch_tokens=512", "schedule.warmup_tokens=512", "execution.device=cpu")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    assert zexp("init", "mine", cwd=folder).returncode == 0
    return folder / "mine"


@pytest.mark.slow
def test_what_is_not_built_is_refused_with_what_builds_it(lab):
    done = zexp("bench", "data", "--json", *WORDS, *SHORT, "store=elsewhere", cwd=lab)
    assert done.returncode == 2 and done.stdout == ""
    for text in ("tokenizer (", "corpus mine (", "packing mine (", "`zexp run arch=mine corpus=mine", "store=elsewhere` builds it"):
        assert text in done.stderr


@pytest.mark.slow
def test_batches_and_texts_of_a_built_corpus_are_measured(lab):
    trained = zexp("run", *WORDS, *SHORT, cwd=lab)
    assert trained.returncode == 0, trained.stderr
    done = zexp("bench", "data", "--json", "--seconds", "0.5", "--against", "1000", *WORDS, *SHORT, cwd=lab)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert [row["phase"] for row in answer["reading"]] == ["pretrain", "anneal"]
    for row in answer["reading"]:
        assert row["batch_tokens"] == 512 and row["sources"] == ["mine"] and row["n"] >= 5
        assert row["tokens_per_second"] == pytest.approx(512 / row["median_seconds"])
        assert row["against"]["share_of_step"] == pytest.approx(1000 / row["tokens_per_second"])
        assert row["against"]["times_faster"] == pytest.approx(row["tokens_per_second"] / 1000)
    (text,) = answer["tokenizing"]
    assert text["source"] == "mine" and 0 < text["tokens"] < text["bytes"] and text["tokens_per_second"] > 0
    shown = zexp("bench", "data", "--seconds", "0.2", *WORDS, *SHORT, cwd=lab).stdout
    assert "pretrain" in shown and "bytes/token" in shown and "Not measured: a disk without its cache" in shown


@pytest.mark.parametrize("words", [["--against", "0"], ["--against", "nan"], ["--seconds", "0"], ["--threads", "0"]])
def test_wrong_arguments_are_refused_before_anything_is_planned(words):
    with pytest.raises(ConfigError, match=words[0]):
        data.main(asked(data, *words))


def test_nothing_to_compare_with_is_nothing_said():
    assert data.against(1e6, None) is None
