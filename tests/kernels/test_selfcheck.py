"""The self-check: what it measures, and what of it is remembered."""

from __future__ import annotations

import json

import pytest
import torch

from tests.kernels import fakes
from zexp.kernels import dispatch, samples, select, selfcheck
from zexp.kernels.selfcheck import Error, Tolerance

BACKEND = select.BACKENDS["rms_norm"][0]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    fakes.install(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selfcheck, "_passed", set())


@pytest.fixture
def checks(monkeypatch):
    """How often the check itself ran."""
    made = []
    examine = selfcheck.examine
    monkeypatch.setattr(selfcheck, "examine", lambda *of: (made.append(of), examine(*of))[1])
    return made


@pytest.mark.parametrize("dtype", selfcheck.TOLERANCES, ids=str)
@pytest.mark.parametrize("name", sorted(samples.CHECKED))
def test_the_torch_backends_pass(name, dtype):
    error = selfcheck.measure(name, getattr(dispatch.TORCH, name), "cpu", dtype)
    assert error.beyond(selfcheck.TOLERANCES[dtype]) is None


def test_every_function_has_samples_to_check_and_to_time():
    assert set(samples.CHECKED) == set(samples.TIMED["cpu"]) == set(samples.TIMED["cuda"])
    assert set(samples.CHECKED) == {name for row in select.operations() for name in dispatch.functions_of(row)}
    for name, sizes in samples.CHECKED.items():
        packs = samples.sample(name, sizes[0]).packs
        assert packs == any("documents" in size for size in sizes), f"{name} has no packed sample"


def test_a_pass_is_remembered_by_the_process_and_in_a_file(checks, monkeypatch):
    assert selfcheck.failing("rms_norm", BACKEND, CPU) is None
    assert selfcheck.failing("rms_norm", BACKEND, CPU) is None
    assert len(checks) == 1
    monkeypatch.setattr(selfcheck, "_passed", set())  # another process
    assert selfcheck.failing("rms_norm", BACKEND, CPU) is None
    assert len(checks) == 1
    (path,) = selfcheck.folder().iterdir()
    found = json.loads(path.read_text())
    assert found["operation"] == "rms_norm" and found["backend"] == "liger-kernel" and found["device"] == "cpu"


def test_other_versions_or_another_device_are_checked_again(checks, monkeypatch):
    for machine in (
        select.Machine(kind="cuda", capability=(9, 0), versions={"triton": "3.6.0"}),
        select.Machine(kind="cuda", capability=(9, 0), versions={"triton": "3.7.1"}),
        select.Machine(kind="cuda", capability=(8, 0), versions={"triton": "3.7.1"}),
    ):
        monkeypatch.setattr(dispatch, "machine", lambda device, machine=machine: machine)
        assert selfcheck.failing("rms_norm", BACKEND, CPU) is None
    assert len(checks) == 3


def test_a_failure_is_not_remembered(checks, monkeypatch):
    right = fakes.LigerRMSNormFunction.apply
    monkeypatch.setattr(fakes.LigerRMSNormFunction, "apply", lambda *args: right(*args) * 1.1)
    assert "values are off by" in selfcheck.failing("rms_norm", BACKEND, CPU)
    monkeypatch.setattr(fakes.LigerRMSNormFunction, "apply", right)
    assert selfcheck.failing("rms_norm", BACKEND, CPU) is None
    assert len(checks) == 2


def test_a_home_that_cannot_be_written_to_costs_the_check_alone(checks, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert selfcheck.failing("rms_norm", BACKEND, CPU) is None


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_it_checks_the_same_whatever_mode_a_model_is_built_in(mode):
    plain = selfcheck.measure("attention", dispatch.TORCH.attention, "cpu", torch.float32)
    with mode():
        assert selfcheck.measure("attention", dispatch.TORCH.attention, "cpu", torch.float32) == plain


def test_not_a_number_is_beyond_every_tolerance():
    assert Error(float("nan"), 0.0).beyond(Tolerance(1.0, 1.0)) is not None
    assert Error(0.0, float("nan")).beyond(Tolerance(1.0, 1.0)) is not None
    assert Error(0.5, 0.5).beyond(Tolerance(1.0, 1.0)) is None
