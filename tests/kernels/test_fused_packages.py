"""The packages of fused kernels themselves, where they are installed: signatures, and what Triton's interpreter runs of them."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels import fakes
from zexp.kernels.selfcheck import TOLERANCES

ROOT = Path(__file__).parents[2]
REAL = [(path, name) for path, functions in fakes.MODULES.items() for name in functions]
SIGNATURE = """
import importlib, inspect, sys
from zexp.kernels.fused import without_init
path, name = sys.argv[1:]
if path.startswith("mamba_ssm"):
    without_init("mamba_ssm", "selective_scan_cuda")
found = getattr(importlib.import_module(path), name)
print(*inspect.signature(getattr(found, "forward", found)).parameters)
"""


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.mark.parametrize(("path", "name"), REAL, ids=lambda x: x)
def test_stand_ins_have_the_signature_of_what_they_stand_for(path, name):
    """The tests of the adapters are worth something only if stand-ins take what the packages take, in the same order."""
    if not installed(path.partition(".")[0]):
        pytest.skip(f"{path} is not installed")
    done = subprocess.run([sys.executable, "-c", SIGNATURE, path, name], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{path} does not import here: {done.stderr.strip().splitlines()[-1]}")
    theirs = [part for part in done.stdout.split() if part != "ctx"]
    fake = fakes.MODULES[path][name]
    ours = list(inspect.signature(getattr(fake, "apply", fake)).parameters)
    assert theirs[: len(ours)] == ours or [part for part in theirs if part in ours] == ours


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "backend", "package"),
    [
        ("ssd", "mamba_ssm", "mamba_ssm"),
        ("gated_norm", "mamba_ssm", "mamba_ssm"),
        ("rms_norm", "liger_kernel", "liger_kernel"),
        ("cross_entropy", "liger_kernel", "liger_kernel"),
        ("rms_norm", "flash_linear_attention", "fla"),
        ("gated_norm", "flash_linear_attention", "fla"),
        ("causal_conv1d", "flash_linear_attention", "fla"),
        ("gated_delta", "flash_linear_attention", "fla"),
        ("retention", "flash_linear_attention", "fla"),
        ("wkv7", "flash_linear_attention", "fla"),
    ],
)
def test_the_real_kernel_agrees_with_the_reference_in_tritons_interpreter(operation, backend, package):
    if not installed(package) or not installed("triton"):
        pytest.skip(f"{package} or triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpreted", operation, backend]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    tolerance = TOLERANCES[torch.float32]
    assert found["value"] < tolerance.value
    assert found["gradient"] < tolerance.gradient
