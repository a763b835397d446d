"""benchmarks/gpu.py: what it writes when pieces fail or do not fit, and that its sizes are models. The run itself needs a GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from zexp.bench import machine
from zexp.bench.timing import Timing
from zexp.calc.model import flops_per_token, parameters

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_piece_is_written_and_neither_a_failure_nor_the_end_of_the_time_loses_others(gpu, tmp_path):
    report = gpu.Report(tmp_path / "results" / "gpu.json", CPU, minutes=1.0)
    read = lambda: json.loads(report.path.read_text())  # noqa: E731
    report.item("steps", "good", lambda: {"tokens_per_second": 1.0})
    assert read()["parts"]["steps"] == {"good": {"tokens_per_second": 1.0}}
    report.item("steps", "bad", lambda: 1 / 0)
    report.item("steps", "long", lambda: pytest.fail("there was no time for it"), seconds=3600)
    found = read()
    assert found["parts"]["steps"]["bad"] == {"error": "ZeroDivisionError: division by zero"} and found["failed"] == ["steps bad"]
    assert found["skipped"][0].startswith("steps long:") and "long" not in found["parts"]["steps"]
    assert found["machine"]["kind"] == "cpu" and found["machine"]["date"] and "mamba-ssm" in found["machine"]["packages"]
    assert [path.name for path in report.path.parent.iterdir()] == ["gpu.json"]


def test_its_models_have_the_sizes_of_their_names(gpu):
    for name, arch in gpu.MODELS["cuda"].items():
        total = parameters(gpu.architecture(name, arch, torch.device("cuda")))["total"]
        said = {"130m": 130e6, "370m": 370e6, "400m": 400e6, "1p2b": 1.2e9, "1p3b": 1.3e9}[name.rpartition("_")[2]]
        assert 0.85 < total / said < 1.1, name
    assert {name for names, _ in gpu.PEERS.values() for name in names} <= set(gpu.MODELS["cuda"])


def test_flops_are_counted_at_chunk_64_whatever_runs(gpu):
    model = gpu.architecture("mamba2_130m", "mamba2_130m", torch.device("cuda"))
    assert model["blocks"]["m"]["chunk"] == 256
    at_64 = gpu.at_chunk_64(model)
    found = gpu.speed(model, Timing((2.0, 1.0, 4.0)), 3, 4096, {"of_vendor": 1e15})
    assert found["tokens_per_second"] == 3 * 4096 / 2.0
    assert found["mfu"]["of_vendor"] == pytest.approx(flops_per_token(at_64, 4096)["train"] * 6144 / 1e15)
    assert flops_per_token(at_64, 4096)["train"] < flops_per_token(model, 4096)["train"]


def test_a_step_on_a_cpu(gpu, monkeypatch):
    monkeypatch.setitem(gpu.SEQ_LEN, "cpu", 32)
    model = gpu.architecture("mamba2_tiny", "mamba2_tiny", CPU)
    found = gpu.measured_step(model, CPU, "auto", {"of_measured": 1e11}, deterministic=True, seconds=0.0)
    assert found["backends"]["ssd"] == "cpp"
    assert found["memory"]["peak_bytes"] is None and found["memory"]["estimated_bytes"] > 0
    assert found["step"]["n"] == 3 and found["losses"][0] == pytest.approx(8.3, abs=0.3)  # ln 4096
    assert not torch.are_deterministic_algorithms_enabled()


def test_on_a_cpu_it_runs_to_its_end_and_says_what_that_is_worth(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "ceilings", lambda device: {"matmul_fp32": 1e11, "matmul_bf16": 2e11, "memory": 1e10})
    out = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cpu", "--only", "peers", "--out", str(out)])
    assert gpu.main() == 0
    found = json.loads(out.read_text())
    assert found["ran_to_its_end"] and "nothing about a GPU" in found["note"]
    assert any("peers" in text for text in found["not_measured"]) and "Not measured: peers" in capsys.readouterr().out


def test_a_peer_that_does_not_import_is_not_run_and_no_failure(gpu, monkeypatch):
    def absent(arch, vocab):
        raise ImportError("No module named 'fla'")

    monkeypatch.setitem(gpu.PEERS, "absent", (("mamba2_130m",), absent))
    monkeypatch.setattr(gpu, "fitting", lambda *of: 1)
    assert gpu.side_by_side("absent", "mamba2_130m", CPU, {}) == {"not_run": "No module named 'fla'"}
