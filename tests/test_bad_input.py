"""Wrong requests: one clear text each, exit code 2, and nothing started. All of a config's own mistakes at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def zexp(*words: str, cwd: Path, store: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ZEXP_STORE": str(store or cwd / "store"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "zexp.cli", *words], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["arch=transformer_tinny"], ["Could not find 'arch/transformer_tinny'", "transformer_tiny"]),
        (["execution.micro_bach=4"], ["micro_bach", "not in"]),
        (["seq_len=many"], ["seq_len", "'many'", "Integer"]),
        (["arch.pattern='4*(a d'"], ["arch.pattern", "never closed"]),
        (["arch.blocks.a.heads=5"], ["heads", "128", "5"]),
        (["phases.pretrain.tokens=10B"], ["source base", "epochs", "max_epochs"]),
        (["mix.sources.base.weight=-1"], ["mix.sources.base.weight = -1", "0 or above"]),
        (["eval.tasks=[bpb_bass]"], ["bpb_bass", "base, high_quality"]),
        (["store=/proc/nowhere"], ["cannot write", "store=DIR"]),
        (["kernels=fused"], ["zexp[gpu]"]),
    ],
    ids=["group choice", "misspelt key", "type", "pattern", "sizes", "too many tokens", "weight", "task", "store", "fused"],
)
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_wrong_request_is_refused_before_anything_starts(verb, words, says, tmp_path):
    done = zexp(verb, *words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    for text in says:
        assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.lstrip().startswith("ConfigError: "), "nothing but the error"
    assert not list(tmp_path.glob("store/trajectory/*")), "something was started"
    assert not (tmp_path / "outputs").exists()


def test_all_of_zexps_own_mistakes_are_reported_together(tmp_path):
    done = zexp("plan", "arch.blocks.a.heads=5", "execution.device=tpu", "eval.tasks=[bpb_bass]", "mix.sources.base.weight=-1",
                "phases.pretrain.tokens=abc", "anneal.shape=round", "optim.eps=0", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2
    said = ("blocks.a.heads = 5", "device = 'tpu'", "bpb_bass", "weight = -1", "tokens = 'abc'", "shape = 'round'", "eps = 0")
    assert [text for text in said if text not in done.stderr] == []
    assert "problems; no training was started" in done.stderr


def test_an_unknown_verb_and_study_are_named(tmp_path):
    done = zexp("rum", cwd=tmp_path)
    assert (done.returncode, "zexp run" in done.stderr) == (2, True)
    done = zexp("report", "quickstrat", cwd=tmp_path)
    assert done.returncode == 2
    assert "'quickstrat' is no study" in done.stderr


def test_a_metric_and_a_baseline_must_exist(tmp_path):
    done = zexp("plan", "+sweeps=quickstart", "study.metric=bpb_base/bits", "study.baseline={arm: contrl}", cwd=tmp_path)
    assert done.returncode == 2
    assert "bpb_base/bits_per_byte" in done.stderr
    assert "contrl" in done.stderr


def test_a_choice_in_both_folders_names_both_files(tmp_path):
    (tmp_path / "conf" / "arch").mkdir(parents=True)
    (tmp_path / "conf" / "arch" / "mamba2_tiny.yaml").write_text("pattern: m\nwidth: 8\n")
    done = zexp("plan", cwd=tmp_path)
    assert done.returncode == 2
    assert str(tmp_path / "conf/arch/mamba2_tiny.yaml") in done.stderr
    assert "define the same choice" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["arch=mamba2_tiny", "seq_len=0"], ["seq_len = 0"]),
        (["-m", "seed=0,x"], ["seed = 'x'", "whole number"]),
        (["-m", "seed=interval(0,3)"], ["takes lists, ranges and globs"]),
        (["seed=99999999999999999999999"], ["below 2^63"]),
        (["anneal.replay.fraction=0.0001"], ["anneal.replay.fraction", "the smallest share"]),
        (["+phases.cool.tokens=10K"], ["+phases={cool:{tokens:10K}}"]),
        (["hydra.launcher.slotz=3"], ["slotz"]),
        (["study.seeds=[0,1]"], ["single run", "-m"]),
        (["anneal=null"], ["anneal=none leaves it out"]),
        (["schedule.warmup_tokens=1M"], ["do not fit into the phase"]),
        (["checkpoint.keep.ends=none"], ["weights or all"]),
    ],
)
def test_other_wrong_requests_are_one_text_too(words, says, tmp_path):
    done = zexp("run", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    for text in says:
        assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("store/trajectory/*")), "something was started"


@pytest.mark.parametrize("verb", ["plan", "calc", "run"])
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["+archh=slim"], ["archh: there is no such key. Did you mean arch?"]),
        (["+optim.weight_decy=0.5", "+study.naem=x"], ["Did you mean optim.weight_decay?", "Did you mean study.name?"]),
        (["++anneal.tokenz=1K"], ["Did you mean anneal.tokens?"]),
    ],
)
def test_a_key_that_plus_adds_and_nothing_reads_is_refused(verb, words, says, tmp_path):
    done = zexp(verb, *words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    for text in says:
        assert text in done.stderr


def test_yaml_that_does_not_parse_is_named_with_its_line(tmp_path):
    (tmp_path / "conf" / "arch").mkdir(parents=True)
    (tmp_path / "conf" / "arch" / "bad.yaml").write_text("pattern: m\nblocks:\n\tm: {}\n")
    done = zexp("plan", "arch=bad", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "bad.yaml" in done.stderr and "line 3" in done.stderr


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(tmp_path):
    done = zexp("run", "execution.device=cuda", cwd=tmp_path)
    assert done.returncode == 2 and "shows no GPU" in done.stderr
    assert not (tmp_path / "store" / "studies").exists()


def test_a_verb_that_never_trains_says_nothing_of_training(tmp_path):
    done = zexp("calc", "arch=transformer_10m", "arch.width=0", "arch.norm.kind=foo", cwd=tmp_path)
    assert done.returncode == 2
    assert "arch.width = 0" in done.stderr and "arch.norm.kind = 'foo'" in done.stderr
    assert done.stderr.endswith("2 problems.\n")
