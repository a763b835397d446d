"""Parts of `zexp bench` run in this process, with ceilings that need no measuring."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.composed import config
from zexp.bench import machine
from zexp.study.resolve import Composed

CEILINGS = {"matmul_fp32": 4e11, "matmul_bf16": 8e11, "memory": 2e10}
Asked = Callable[..., argparse.Namespace]


@pytest.fixture
def ceilings(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Instead of seconds of matrix products."""
    monkeypatch.setattr(machine, "ceilings", lambda device: dict(CEILINGS))
    monkeypatch.setattr(
        machine, "matmul_flops_per_second", lambda device, dtype, seconds: CEILINGS[f"matmul_{'bf16' if 'bf' in str(dtype) else 'fp32'}"]
    )
    monkeypatch.setattr(machine, "memory_bytes_per_second", lambda device: CEILINGS["memory"])
    return CEILINGS


def asked(part: Any, *words: str) -> argparse.Namespace:
    """What a part's parser makes of its arguments."""
    parser = argparse.ArgumentParser()
    part.add_arguments(parser)
    return parser.parse_args(words)


def with_config(options: argparse.Namespace, *overrides: tuple[str, ...]) -> argparse.Namespace:
    """The same with composed configs, one for each tuple of overrides."""
    options.composed = [
        Composed(config(*words), {"arch": next((w.partition("=")[2] for w in words if w.startswith("arch=")), None)}, {}, list(words))
        for words in overrides
    ]
    return options


def answer_of(part: Any, options: argparse.Namespace, capsys: pytest.CaptureFixture[str]) -> Any:
    """What the part prints with --json: one object, nothing else on stdout."""
    options.json = True
    assert part.main(options) == 0
    return json.loads(capsys.readouterr().out)
