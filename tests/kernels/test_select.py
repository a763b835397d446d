"""Which backend an operation gets, and what is refused. Packages and devices are made up."""

from __future__ import annotations

import logging

import pytest

from zexp.config.errors import ConfigError
from zexp.kernels import dispatch, select
from zexp.kernels.select import DEFECTS, Machine

ALL = sorted(select.BACKENDS)
A100 = Machine(kind="cuda", capability=(8, 0), versions={"triton": "3.7.1", "cuda": "12.8", "torch": "2.12.1"})


def machine(capability: tuple[int, int], **versions: str) -> Machine:
    return Machine(kind="cuda", capability=capability, versions={**A100.versions, **versions})


@pytest.fixture
def installed(monkeypatch):
    """Makes find_spec find these top-level modules and no others; without a call, all."""

    def only(*modules: str) -> None:
        monkeypatch.setattr(select, "find_spec", lambda module: object() if module in modules else None)

    monkeypatch.setattr(select, "find_spec", lambda module: object())
    return only


def names(kernels="auto", operations=ALL, on=A100, *, deterministic=False, failing=lambda operation, backend: None):
    choices = select.choose(kernels, operations, on, deterministic=deterministic, failing=failing)
    return {operation: choice.name for operation, choice in choices.items()}


def test_on_a_cpu_auto_takes_what_there_is_in_cpp(monkeypatch):
    monkeypatch.setattr(select, "compiler", lambda: "/usr/bin/g++")
    operations = [*select.IN_CPP, "wkv7"]
    found = names("auto", operations, Machine(kind="cpu"), deterministic=True)
    assert found == dict.fromkeys(select.IN_CPP, "cpp") | {"wkv7": "torch"}
    assert set(names("torch", operations, Machine(kind="cpu")).values()) == {"torch"}


def test_without_a_compiler_a_cpu_gets_torch_and_is_told_why(monkeypatch):
    monkeypatch.setattr(select, "compiler", lambda: None)
    choice = select.choose("auto", ["causal_conv1d"], Machine(kind="cpu"), deterministic=True, failing=lambda *of: None)
    assert choice["causal_conv1d"].name == "torch"
    assert choice["causal_conv1d"].passed_over == (("cpp", "no C++ compiler was found (g++, clang++ or $CXX)"),)


def test_on_a_device_without_backends_every_operation_gets_torch():
    assert set(names("auto", ALL, Machine(kind="meta")).values()) == {"torch"}


def test_torch_is_torch_on_a_gpu_too(installed):
    assert set(names("torch").values()) == {"torch"}


@pytest.mark.parametrize("choice", ["auto", "fused"])
def test_with_all_packages_each_operation_gets_its_first_backend(choice, installed):
    assert names(choice) == {operation: row[0].name for operation, row in select.BACKENDS.items()}


def test_an_operation_without_a_fused_backend_gets_torch_whatever_is_asked_for(installed):
    assert names("fused", ["mlstm", "rotary", "ssd"]) == {"mlstm": "torch", "rotary": "torch", "ssd": "mamba-ssm"}


def test_auto_takes_what_is_there(installed):
    installed("fla", "triton")
    found = names()
    assert found["causal_conv1d"] == found["wkv7"] == found["rms_norm"] == "flash-linear-attention"
    assert found["attention"] == "torch-flash" and found["ssd"] == found["cross_entropy"] == "torch"


def test_a_package_without_its_compiled_extension_is_not_there(installed):
    installed("mamba_ssm", "triton", "causal_conv1d", "flash_attn")
    found = names()
    assert found["ssd"] == "mamba-ssm"  # Triton alone
    assert found["selective_scan"] == found["causal_conv1d"] == "torch" and found["attention"] == "torch-flash"


def test_auto_falls_back_where_the_self_check_fails_and_says_why(installed, caplog):
    def failing(operation, backend):
        return "values are off" if backend.name in ("flash-attn", "mamba-ssm") else None

    choices = select.choose("auto", ["attention", "ssd"], A100, deterministic=False, failing=failing)
    assert choices["attention"].name == "torch-flash" and choices["ssd"].name == "torch"
    with caplog.at_level(logging.INFO):
        dispatch.say(choices)
    assert [record.message for record in caplog.records] == [
        "Kernels: attention torch-flash, ssd torch.",
        "Kernels: flash-attn is not taken for attention: values are off.",
        "Kernels: mamba-ssm is not taken for ssd: values are off.",
    ]


def test_nothing_is_logged_of_torch_alone(caplog):
    with caplog.at_level(logging.INFO):
        dispatch.say(select.choose("torch", ALL, Machine(kind="cpu"), deterministic=True, failing=lambda *of: None))
    assert not caplog.records


def test_fused_is_an_error_where_the_only_backend_fails_the_self_check(installed):
    with pytest.raises(ConfigError, match=r"kernels = fused: .*\n  ssd by mamba-ssm: values are off\n.*kernels=auto"):
        names("fused", ["attention", "ssd"], failing=lambda operation, backend: "values are off" if operation == "ssd" else None)


def test_fused_takes_the_second_backend_where_the_first_fails(installed):
    found = names("fused", ["attention"], failing=lambda operation, backend: "no" if backend.name == "flash-attn" else None)
    assert found == {"attention": "torch-flash"}


def test_the_self_check_is_not_run_for_what_is_not_taken_anyway(installed):
    asked = []
    installed("mamba_ssm", "triton")
    names("auto", ["ssd", "wkv7", "attention"], failing=lambda operation, backend: asked.append((operation, backend.name)))
    assert asked == [("ssd", "mamba-ssm"), ("attention", "torch-flash")]


def test_fused_with_missing_packages_names_them_and_the_extra(monkeypatch):
    monkeypatch.setattr(select, "find_spec", lambda module: None)
    for refuse in (
        lambda operations: select.check("fused", operations),
        lambda operations: names("fused", operations),
    ):
        with pytest.raises(ConfigError) as error:
            refuse(["ssd", "causal_conv1d", "attention", "mlstm"])
        assert "the packages causal-conv1d, mamba-ssm are not installed" in str(error.value)
        assert "zexp[gpu]" in str(error.value) and "kernels=torch" in str(error.value)
    with pytest.raises(ConfigError, match="the package mamba-ssm is not installed"):
        select.check("fused", ["ssd"])


def test_one_of_several_packages_is_enough_for_fused(installed):
    installed("fla", "triton")
    select.check("fused", ["causal_conv1d", "rms_norm"])


def test_fused_on_a_cpu_is_refused_even_with_the_packages(installed):
    with pytest.raises(ConfigError, match="fused kernels run on a CUDA device, and the device is cpu"):
        select.check("fused", ["ssd"], "cpu")
    with pytest.raises(ConfigError, match="the device is cpu"):
        names("fused", ["ssd"], Machine(kind="cpu"))
    select.check("fused", ["ssd"], "auto")  # a plan does not know the device


def test_an_unknown_choice_lists_the_known_ones():
    with pytest.raises(ConfigError, match="kernels = cuda: choose one of auto, torch, fused"):
        select.check("cuda", [])


def test_the_operations_of_a_model_are_its_kernel_numerics():
    assert select.operations_of({"block.mlp": 1, "kernel.ssd": 1}) == ["ssd"]


def test_deterministic_algorithms_leave_out_what_is_not(installed):
    found = names(deterministic=True)
    assert found["selective_scan"] == "torch" and found["ssd"] == "mamba-ssm"
    assert found["causal_conv1d"] == "flash-linear-attention"
    why = select.reason_against("selective_scan", select.BACKENDS["selective_scan"][0], A100, deterministic=True)
    assert "execution.deterministic" in why


def test_an_old_device_gets_torch_and_the_reason_says_so(installed):
    old = machine((7, 5))
    assert set(names(on=old).values()) == {"torch"}
    choices = select.choose("auto", ["ssd"], old, deterministic=False, failing=lambda *of: None)
    assert choices["ssd"].passed_over == (("mamba-ssm", "needs compute capability 8.0, this is 7.5"),)


@pytest.mark.parametrize(
    ("operation", "capability", "versions", "taken"),
    [
        ("gated_delta", (9, 0), {"triton": "3.6.0"}, False),
        ("retention", (9, 0), {"triton": "3.6.0"}, False),
        ("retention", (9, 0), {"triton": "3.4.0"}, False),
        ("retention", (9, 0), {"triton": "3.3.1"}, True),
        ("retention", (9, 0), {"triton": "3.7.1"}, True),
        ("gated_delta", (8, 0), {"triton": "3.6.0"}, True),
        ("gated_delta", (10, 0), {"triton": "3.6.0"}, True),
        ("wkv7", (9, 0), {"triton": "3.6.0"}, True),  # does not call that backward pass
    ],
)
def test_flash_linear_attention_640_on_hopper(operation, capability, versions, taken, installed):
    choice = select.choose("auto", [operation], machine(capability, **versions), deterministic=False, failing=lambda *of: None)
    assert (choice[operation].name == "flash-linear-attention") is taken
    if not taken:
        assert "fla-org/flash-linear-attention#640" in choice[operation].passed_over[0][1]


def test_fused_too_leaves_a_known_defect_to_torch(installed):
    assert names("fused", ["retention"], machine((9, 0), triton="3.6.0")) == {"retention": "torch"}


@pytest.mark.parametrize(
    ("capability", "cuda", "name"),
    [((10, 3), "13.0", "flash-linear-attention"), ((10, 3), "12.9", "causal-conv1d"), ((9, 0), "13.0", "causal-conv1d")],
)
def test_causal_conv1d_105_on_sm_103(capability, cuda, name, installed):
    on = machine(capability, cuda=cuda)
    choice = select.choose("auto", ["causal_conv1d"], on, deterministic=False, failing=lambda *of: None)
    assert choice["causal_conv1d"].name == name
    if name != "causal-conv1d":
        assert "Dao-AILab/causal-conv1d#105" in choice["causal_conv1d"].passed_over[0][1]


def test_every_defect_names_an_issue_and_operations_that_its_package_has():
    for defect in DEFECTS:
        assert "#" in defect.issue
        for operation in defect.operations:
            assert defect.package in {backend.package for backend in select.BACKENDS[operation]}


def test_a_defect_of_some_calls_does_not_exclude_the_backend(installed):
    assert names("auto", ["ssd"], machine((9, 0)))["ssd"] == "mamba-ssm"
    assert any(defect.calls and defect.package == "mamba-ssm" for defect in DEFECTS)


def test_every_backend_has_its_adapter():
    from importlib import import_module

    for operation, row in select.BACKENDS.items():
        module = import_module(f"zexp.kernels.{operation}.fused_backend")
        assert all(callable(getattr(module, backend.adapter())) for backend in row)


def test_the_packages_are_those_of_the_extra():
    import tomllib
    from pathlib import Path

    extra = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    assert {line.partition("==")[0] for line in extra} >= set(select.packages())
