"""Whether a backend computes on this device what the references say: values and gradients, on small and odd shapes.

The reference reads the same rounded inputs and computes in fp32 on the CPU. An error is |difference| / |reference|, norms over
all numbers of an array, the largest over the shapes.

A pass is remembered, for the process and in a file a device and versions ($XDG_CACHE_HOME/zexp/kernels, or ~/.cache), so that
a stage does not check again what the stage before it has checked; what fails is tried again each time.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zexp
from zexp.kernels import dispatch, fused, samples
from zexp.kernels.cache import folder
from zexp.kernels.cpp import library
from zexp.kernels.fused import adapter, adapters_of
from zexp.kernels.samples import Sample
from zexp.kernels.select import CPP, Backend

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tolerance:
    """The largest errors (see above) of values and of gradients."""

    value: float
    gradient: float


# A bf16 number is off by 2^-9 at most, 0.1 % in the mean, and kernels round what goes into their products once or twice more and
# the states they carry: some 0.5 % in the values, twice that in the gradients, which pass through two such chains. What is
# computed wrong is off by whole terms: a document that leaks one position into the next is 5 % and more of these shapes.
# In fp32 what is left are sums in another order, and exponentials by the device's fast instruction.
TOLERANCES = {torch.bfloat16: Tolerance(0.02, 0.03), torch.float32: Tolerance(1e-4, 3e-4)}


@dataclass(frozen=True)
class Error:
    """Of a function on a device: the largest errors of its values and of its gradients."""

    value: float
    gradient: float

    def beyond(self, tolerance: Tolerance) -> str | None:
        """What is wrong, None = nothing. NaN is beyond."""
        if not self.value <= tolerance.value:
            return f"values are off by {self.value:.1e} of the fp32 reference ({tolerance.value:.0e} is allowed)"
        if not self.gradient <= tolerance.gradient:
            return f"gradients are off by {self.gradient:.1e} of the fp32 reference ({tolerance.gradient:.0e} is allowed)"
        return None


_passed: set[str] = set()


def failing(operation: str, backend: Backend, device: torch.device) -> str | None:
    """Why a backend of an operation cannot be trusted on a device, None = it passed."""
    where = identity(operation, backend, device)
    name = hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()[:16]
    if name in _passed:
        return None
    path = folder() / f"{operation}-{name}.json"
    if path.exists():
        _passed.add(name)
        return None
    wrong = examine(operation, backend, device)
    if wrong is None:
        log.info("Kernels: %s by %s agrees with the reference on %s.", operation, backend.name, where["device"])
        _passed.add(name)
        _remember(path, where)
    return wrong


def examine(operation: str, backend: Backend, device: torch.device) -> str | None:
    """The check itself: what is wrong, None = nothing."""
    try:
        functions = adapter(operation, backend.adapter())
    except Exception as error:  # a package built for another torch fails in ways of its own; what it said is told
        return f"does not import: {_said(error)}"
    for name, one in functions.items():
        checked = 0
        for dtype, tolerance in TOLERANCES.items():
            try:
                found = measure(name, one.run, device, dtype, refuses=one.refuses)
            except Exception as problem:  # compilers and launchers of kernels raise anything
                return f"{name} raises on {_type(dtype)}: {_said(problem)}"
            if found is not None and (wrong := found.beyond(tolerance)) is not None:
                return f"{name} on {_type(dtype)}: {wrong}"
            checked += found is not None
        if not checked:
            return f"{name}: it refuses every shape that it is checked with"
    return None


def measure(
    name: str,
    function: Callable[..., Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    refuses: Callable[..., str | None] | None = None,
) -> Error | None:
    """The errors of a function over the shapes that it is checked with; None = it refuses all of them."""
    found: list[Error] = []
    # Whoever builds a model may be about to evaluate it, or under autocast: neither is the operation's business.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(torch.device(device).type, enabled=False):
        for number, size in enumerate(samples.CHECKED[name]):
            one = samples.sample(name, size, seed=number)
            given = one.given(device, dtype)
            if refuses is not None and one.call(refuses, given, device) is not None:  # type: ignore[arg-type]
                continue
            found.append(compared(name, function, one, given, device))
    return None if not found else Error(max(e.value for e in found), max(e.gradient for e in found))


def compared(
    name: str, function: Callable[..., Tensor], one: Sample, given: dict[str, Tensor | None], device: torch.device | str
) -> Error:
    """The errors of a function on one sample, of which it is given `given`."""
    truth_given = {
        key: None if tensor is None else _again(tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.cpu())
        for key, tensor in given.items()
    }
    wanted = one.truth(name, truth_given)
    made = one.call(function, given, device)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    wanted_gradients = torch.autograd.grad(wanted, _wanting(truth_given), weights)
    gradients = torch.autograd.grad(made, _wanting(given), weights.to(device, made.dtype))
    pairs = zip(gradients, wanted_gradients, strict=True)
    return Error(_distance(made, wanted), max(_distance(ours, theirs) for ours, theirs in pairs))


def identity(operation: str, backend: Backend, device: torch.device) -> dict[str, Any]:
    """What a pass is good for: the device's model, all versions, and the code that checks and that was checked."""
    found = dispatch.machine(device)
    modules = (samples, fused, sys.modules[__name__], adapters_of(operation, backend.adapter()))
    code = [inspect.getsource(module) for module in modules]
    if backend is CPP:
        code.append(inspect.getsource(library))
        code += library.sources(operation).values()
    return {
        "operation": operation,
        "backend": backend.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "capability": found.capability_text,
        "versions": dict(found.versions),
        "zexp": zexp.__version__,
        "code": hashlib.sha256("".join(code).encode()).hexdigest()[:16],
    }


def _remember(path: Path, where: dict[str, Any]) -> None:
    """Whole or not at all; a home that cannot be written to only costs the check again."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(where, file, indent=1)
        os.replace(temporary, path)


def _distance(ours: Tensor, wanted: Tensor) -> float:
    difference = ours.detach().cpu().double() - wanted.detach().double()
    return float(difference.norm() / wanted.detach().double().norm())


def _wanting(given: dict[str, Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in given.values() if tensor is not None and tensor.requires_grad]


def _again(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no word'}"

