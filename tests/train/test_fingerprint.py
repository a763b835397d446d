"""The fingerprint names the backend that each operation got, and the versions of what carries it."""

from __future__ import annotations

from tests.blocks.archs import TINY
from zexp.blocks.resolve import resolve_model
from zexp.kernels import dispatch, select
from zexp.kernels.select import Choice
from zexp.train.fingerprint import fingerprint

REQUEST = {"kernels": "auto", "threads": 1, "micro_batch": 4, "ranks": {"data": 1, "nodes": 1}, "deterministic": True}
MODEL = resolve_model(TINY["zamba2_tiny"], 300)


def test_on_a_cpu_every_operation_is_torchs():
    found = fingerprint(MODEL, REQUEST, "cpu")
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
