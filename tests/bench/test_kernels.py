"""The table of kernels, on a CPU and with stand-ins for the packages."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext

import pytest
import torch

from tests.kernels import fakes
from zexp.bench import kernels, machine
from zexp.config.errors import ConfigError
from zexp.kernels import samples, select, selfcheck

SMALL = {name: sizes[0] for name, sizes in samples.CHECKED.items()}


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ceilings", lambda device: {"matmul_fp32": 1e11, "matmul_bf16": 2e11, "memory": 1e10})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selfcheck, "_passed", set())


def table(**options):
    return kernels.run("cpu", seconds=0.0, sizes=SMALL, **options)


def test_on_a_cpu_torch_and_cpp_are_measured_and_the_others_say_why_not():
    found = table()
    assert {row["function"] for row in found["rows"]} == set(SMALL)
    for row in found["rows"]:
        if row["backend"] in ("torch", "cpp"):
            assert row["taken"] == (row["backend"] == "cpp" or row["operation"] not in select.IN_CPP)
            assert row["error"]["gradient"] < 1e-5
            assert row["forward"]["n"] >= 3 and row["forward_backward"]["best_seconds"] > 0
        else:
            assert not row["taken"] and row["why_not"] == "needs a CUDA device" and "forward" not in row
    assert found["not_measured"] and found["machine"]["kind"] == "cpu" and "liger-kernel" in found["machine"]["packages"]
    json.dumps(found)


@pytest.fixture
def gpu(monkeypatch):
    """The CPU passes for a GPU with all packages."""
    fakes.install(monkeypatch)
    monkeypatch.setattr("torch.nn.attention.sdpa_kernel", lambda kinds, set_priority=False: nullcontext())
    monkeypatch.setattr(select, "find_spec", lambda module: object())
    found = select.Machine(kind="cuda", capability=(8, 0), versions={"triton": "3.7.1"})
    monkeypatch.setattr("zexp.kernels.dispatch.machine", lambda device: found)


def test_with_the_packages_the_first_sound_one_is_taken_and_all_are_timed(gpu):
    found = table(dtype="bf16", operations=["causal_conv1d", "ssd"])
    rows = {(row["operation"], row["backend"]): row for row in found["rows"]}
    cuda = rows["causal_conv1d", "causal-conv1d"]
    assert not cuda["taken"] and "execution.deterministic" in cuda["why_not"] and cuda["forward"]["of_ceiling"] > 0
    assert rows["causal_conv1d", "flash-linear-attention"]["taken"] and rows["ssd", "mamba-ssm"]["taken"]
    own = rows["ssd", "torch"]
    assert own["why_not"] == "another before it is taken" and 1e-4 < own["error"]["value"] < 0.02


def test_a_kernel_that_computes_wrong_is_not_taken_and_not_timed(gpu, monkeypatch):
    import mamba_ssm.ops.triton.ssd_combined as package

    right = package.mamba_chunk_scan_combined
    monkeypatch.setattr(package, "mamba_chunk_scan_combined", lambda *args, **options: 1.1 * right(*args, **options))
    fused, _, own = table(dtype="bf16", operations=["ssd"])["rows"]
    assert "values are off" in fused["why_not"] and "forward" not in fused and own["taken"]


def test_what_a_kernel_refuses_is_said(gpu):
    fused, _, own = table(dtype="fp32", operations=["ssd"])["rows"]
    assert "inputs in float32" in fused["why_not"] and own["taken"]


def test_a_known_defect_stands_in_the_table(gpu, monkeypatch):
    hopper = select.Machine(kind="cuda", capability=(9, 0), versions={"triton": "3.6.0"})
    monkeypatch.setattr("zexp.kernels.dispatch.machine", lambda device: hopper)
    assert "#640" in table(dtype="bf16", operations=["retention"])["rows"][0]["why_not"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"operations": ["sdd"]}, "No operation with backends besides torch is called sdd. There are activation"),
        ({"dtype": "fp8"}, "choose one of bf16, fp32"),
        ({"device": "tpu"}, "it is auto, cpu or cuda"),
    ],
)
def test_bad_input(options, says):
    with pytest.raises(ConfigError, match=says):
        kernels.run(**{"device": "cpu", **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="torch sees no GPU here"):
        kernels.run("cuda")


@pytest.mark.parametrize("as_json", [True, False])
def test_the_verb_prints_a_table_or_json(as_json, capsys, monkeypatch):
    monkeypatch.setitem(samples.TIMED, "cpu", SMALL)
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    options = ["--operations", "rms_norm", "--seconds", "0.001", "--threads", "1", "--device", "cpu"] + (["--json"] if as_json else [])
    assert kernels.main(parser.parse_args(options)) == 0
    out, progress = capsys.readouterr()
    assert "1/1 rms_norm" in progress
    if as_json:
        assert [row["backend"] for row in json.loads(out)["rows"]] == ["liger-kernel", "flash-linear-attention", "cpp", "torch"]
    else:
        assert all(f"{name} " in out for name in ("rms_norm", "installed", "liger-kernel", "cpp")) and "Not measured here" in out


@pytest.mark.parametrize("seconds", ["nan", "-1", "0", "inf"])
def test_times_that_are_none_are_refused(seconds):
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    with pytest.raises(ConfigError, match="a finite number above 0"):
        kernels.main(parser.parse_args(["--seconds", seconds]))
