"""The fingerprint names the backend that each operation got, and the versions of what carries it."""

from __future__ import annotations

from tests.blocks.archs import TINY
from zexp.blocks.resolve import resolve_model
from zexp.kernels import dispatch, select
from zexp.kernels.cpp import compiler
from zexp.kernels.select import Choice
from zexp.train.fingerprint import fingerprint

REQUEST = {"kernels": "auto", "threads": 1, "micro_batch": 4, "ranks": {"data": 1, "nodes": 1}, "deterministic": True}
MODEL = resolve_model(TINY["zamba2_tiny"], 300)


def test_on_a_cpu_the_compiler_of_the_kernels_in_cpp_is_named():
    found = fingerprint(MODEL, REQUEST, "cpu")
    assert found["backends"] == {name: "cpp" if name in select.IN_CPP else "torch" for name in found["backends"]}
    assert found["packages"] == {"c++": compiler.identity()}


def test_kernels_of_torch_alone_name_no_package():
    found = fingerprint(MODEL, REQUEST | {"kernels": "torch"}, "cpu")
    assert set(found["backends"].values()) == {"torch"} and found["packages"] == {}
    assert {"ssd", "attention", "cross_entropy", "rms_norm", "rotary"} <= set(found["backends"])


def test_fused_backends_and_their_versions_are_named(monkeypatch):
    asked = {}

    def chosen(kernels, operations, device, *, deterministic):
        asked.update(kernels=kernels, device=device, deterministic=deterministic)
        return {name: Choice(select.BACKENDS[name][0] if name in ("ssd", "attention") else None) for name in operations}

    monkeypatch.setattr(dispatch, "chosen", chosen)
    monkeypatch.setattr(select, "version", lambda package: f"{package}'s")
    found = fingerprint(MODEL, REQUEST, "cpu")
    assert asked == {"kernels": "auto", "device": "cpu", "deterministic": True}
    assert found["backends"]["ssd"] == "mamba-ssm" and found["backends"]["rms_norm"] == "torch"
    assert found["packages"] == {"flash-attn": "flash-attn's", "mamba-ssm": "mamba-ssm's", "triton": "triton's"}
