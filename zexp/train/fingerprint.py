"""The numerics fingerprint: what decides the last bits of a training besides its id.

Two trainings of one id under one fingerprint agree bit for bit; under different ones within rounding. A state records
which stretches of its tokens were trained under which fingerprint, its ancestors' included.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch

from zexp.blocks.resolve import numerics
from zexp.kernels import dispatch, select
from zexp.kernels.cpp.compiler import identity
from zexp.kernels.select import CPP, Choice
from zexp.store.ids import semantic_id, short
from zexp.store.provenance import cpu_model
from zexp.train.optimizer import IMPLEMENTATION


def fingerprint(model: Mapping[str, Any], request: Mapping[str, Any], device: str) -> dict[str, Any]:
    """model: the semantic block; request: micro_batch, threads, ranks, kernels, deterministic; device: cpu or cuda."""
    operations = select.operations_of(numerics(model))
    choices = dispatch.chosen(request["kernels"], operations, device, deterministic=request["deterministic"])
    return {
        "device": device_model(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "backends": {operation: choice.name for operation, choice in choices.items()},
        "packages": _packages(choices),
        "threads": request["threads"],
        "micro_batch": request["micro_batch"],
        "layout": _layout(request["ranks"]),
        "optimizer": IMPLEMENTATION,
        "deterministic": request["deterministic"],
    }


def name_of(details: Mapping[str, Any]) -> str:
    """16 hex digits."""
    return short(semantic_id(dict(details)))


def _packages(choices: Mapping[str, Choice]) -> dict[str, str | None]:
    """Versions of what carries the kernels that were chosen, and of what compiles them: triton, or the C++ compiler, of which
    flags and processor are part.
    """
    fused = [choice.backend for choice in choices.values() if choice.backend is not None]
    names = {backend.package for backend in fused if backend.package is not None}
    if names:
        names.add("triton")
    versions = {name: select.version(name) for name in sorted(names)}
    return versions | {"c++": identity()} if CPP in fused else versions


def _layout(ranks: Mapping[str, Any]) -> str:
    """Over how many processes, and machines, a sum of gradients goes."""
    if ranks["data"] == 1:
        return "one process"
    return f"data {ranks['data']}" + (f", nodes {ranks['nodes']}" if ranks["nodes"] > 1 else "")


@functools.cache
def device_model(device: str) -> str:
    """The name that the vendor gives the device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_model()


def extended(intervals: list[dict[str, Any]], start: int, to: int, fingerprint_name: str) -> list[dict[str, Any]]:
    """The intervals {from, to, fingerprint} of a state, lengthened by [start, to)."""
    if to == start:
        return intervals
    if intervals and intervals[-1]["to"] == start and intervals[-1]["fingerprint"] == fingerprint_name:
        return [*intervals[:-1], {**intervals[-1], "to": to}]
    return [*intervals, {"from": start, "to": to, "fingerprint": fingerprint_name}]
