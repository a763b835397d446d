"""Which backend an operation gets, and what is refused."""

from __future__ import annotations

import pytest

from zexp.config.errors import ConfigError
from zexp.kernels import select


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_every_operation_gets_torch(choice):
    assert select.backends(choice, ["ssd", "attention"]) == {"ssd": "torch", "attention": "torch"}


def test_fused_with_missing_packages_names_them_and_the_extra(monkeypatch):
    monkeypatch.setattr(select, "find_spec", lambda module: None)
    with pytest.raises(ConfigError) as error:
        select.backends("fused", ["ssd", "causal_conv1d", "rms_norm"])
    assert "the packages causal-conv1d, mamba-ssm are not installed" in str(error.value)
    assert "zexp[gpu]" in str(error.value) and "kernels=torch" in str(error.value)


def test_fused_is_refused_even_with_the_packages(monkeypatch):
    monkeypatch.setattr(select, "find_spec", lambda module: object())
    with pytest.raises(ConfigError, match="this version of zexp has no fused backend for ssd"):
        select.backends("fused", ["ssd"])


def test_an_unknown_choice_lists_the_known_ones():
    with pytest.raises(ConfigError, match="kernels = cuda: choose one of auto, torch, fused"):
        select.backends("cuda", [])


def test_the_operations_of_a_model_are_its_kernel_numerics():
    assert select.operations_of({"block.mlp": 1, "kernel.ssd": 1}) == ["ssd"]
