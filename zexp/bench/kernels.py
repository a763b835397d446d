"""Every operation that has fused backends, on each of them: whether it is installed and taken, how far it is from the fp32
reference, and how long a forward pass takes, alone and with a backward pass.

A time's share of the ceiling is the time that the device needs at least, divided by it: the larger of FLOPs over the measured
rate of matrix products in that dtype and bytes over the measured rate of memory. Bytes are those of the inputs and of the output,
read or written once; both passes together are counted as three forward passes. FLOPs are those of the form with the fewest
(chunks of 64 for the recurrences), whatever a kernel computes.

What a training takes depends on execution.deterministic, true as it comes; a kernel that is not deterministic is timed all
the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from zexp.bench import flags, machine, tables
from zexp.bench.progress import progress
from zexp.bench.setting import device_of
from zexp.bench.timing import Timing, in_turns
from zexp.config.errors import ConfigError
from zexp.kernels import dispatch, samples, select, selfcheck
from zexp.kernels.cpp.compiler import compiler, identity
from zexp.kernels.fused import adapter
from zexp.kernels.samples import Sample
from zexp.kernels.select import CPP, TORCH, Backend
from zexp.train.machine import settled

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SECONDS = 10.0  # of repeats, all functions with all their backends and both passes together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `zexp bench kernels`."""
    flags.add_common(parser, seconds=SECONDS, of_config=False)
    parser.add_argument("--dtype", default=None, choices=sorted(DTYPES), help="of activations; bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--operations", nargs="+", default=None, metavar="NAME", help=f"of {', '.join(select.operations())}")


def main(options: argparse.Namespace) -> int:
    """`zexp bench kernels`. Raises ConfigError."""
    flags.check(flags.problems_of(options))
    device, threads = options.device or "auto", options.threads or torch.get_num_threads()
    with settled(threads, deterministic=False):
        found = run(device, dtype=options.dtype, operations=options.operations, seconds=options.seconds)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 0


def run(
    device: str = "auto",
    *,
    dtype: str | None = None,
    operations: Sequence[str] | None = None,
    seconds: float = SECONDS,
    sizes: dict[str, samples.Size] | None = None,
    ceilings: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The table as plain data. seconds: of repeats, all together; a few of each are made anyway. sizes: what each function is timed
    with, None = samples.TIMED of the device. ceilings: of zexp.bench.machine, None = they are measured now.

    Raises ConfigError for an operation without backends besides torch or a device that is not there.
    """
    where = torch.device(device_of(device))
    name = dtype or ("bf16" if where.type == "cuda" else "fp32")
    if name not in DTYPES:
        raise ConfigError(f"dtype = {name}: choose one of {', '.join(sorted(DTYPES))}.")
    chosen = select.operations() if operations is None else list(operations)
    if unknown := [operation for operation in chosen if operation not in select.operations()]:
        raise ConfigError(
            f"No operation with backends besides torch is called {', '.join(unknown)}. There are {', '.join(select.operations())}."
        )
    timed = samples.TIMED[where.type] if sizes is None else sizes
    ceilings = machine.ceilings(where) if ceilings is None else ceilings
    rows: list[dict[str, Any]] = []
    share = seconds / sum(len(dispatch.functions_of(operation)) for operation in chosen)
    with progress("kernels", len(chosen)) as say:
        for operation in chosen:
            say(operation)
            verdicts = {backend.name: verdict(operation, backend, where) for backend in select.backends(operation)}
            for function in dispatch.functions_of(operation):
                rows += _rows(operation, function, verdicts, where, name, timed[function], share, ceilings)
    return {
        "machine": machine.facts(where) | {"packages": {package: select.version(package) for package in select.packages()}},
        "ceilings": ceilings,
        "dtype": name,
        "rows": rows,
        "not_measured": not_measured(where),
    }


def verdict(operation: str, backend: Backend, device: torch.device) -> str | None:
    """Why a backend is not taken on a device, determinism aside (the row says that); None = it is sound."""
    found = dispatch.machine(device)
    return select.reason_against(operation, backend, found, deterministic=False) or selfcheck.failing(operation, backend, device)


def not_measured(device: torch.device) -> list[str]:
    """What the table cannot say here."""
    if device.type == "cuda":
        return []
    return ["fused backends: they run on a CUDA device; errors and times are those of the C++ and torch backends on this CPU"]


def _rows(
    operation: str,
    function: str,
    verdicts: dict[str, str | None],
    device: torch.device,
    dtype: str,
    size: samples.Size,
    seconds: float,
    ceilings: dict[str, float],
) -> list[dict[str, Any]]:
    """One of every backend of a function, torch last."""
    one = samples.sample(function, size)
    given = one.given(device, DTYPES[dtype])
    works: dict[str, Callable[..., Tensor]] = {}
    rows: list[dict[str, Any]] = []
    taken = False
    for backend in (*select.backends(operation), None):
        name = TORCH if backend is None else backend.name
        row: dict[str, Any] = {"operation": operation, "function": function, "backend": name}
        row |= {"package": None if backend is None else backend.package, "version": _version(backend), "size": dict(size)}
        why, refuses = None, None
        if backend is not None:
            why = verdicts[backend.name]
            if why is None:
                fused = adapter(operation, backend.adapter())[function]
                refuses = fused.refuses
                why = one.call(fused.refuses, given, device)  # type: ignore[arg-type,assignment]
                if why is None:
                    works[backend.name] = fused.run
            why = why or (None if backend.deterministic else "not deterministic: only with execution.deterministic=false")
        else:
            works[TORCH] = getattr(dispatch.TORCH, function)
        row |= {"taken": not taken and why is None, "why_not": "another before it is taken" if taken and why is None else why}
        taken = taken or why is None
        if row["backend"] in works:
            error = selfcheck.measure(function, works[row["backend"]], device, DTYPES[dtype], refuses=refuses)
            row["error"] = None if error is None else {"value": error.value, "gradient": error.gradient}
        rows.append(row)
    times = _times(one, works, given, device, seconds)
    for row in rows:
        for step, passes in {"forward": 1, "forward_backward": 3}.items():
            if (time := times.get(f"{row['backend']} {step}")) is not None:
                least = passes * _least_seconds(one, given, dtype, ceilings)
                row[step] = time.to_json() | {"of_ceiling": least / time.best}
    return rows


def _times(
    one: Sample,
    works: dict[str, Callable[..., Tensor]],
    given: dict[str, Tensor | None],
    device: torch.device,
    seconds: float,
) -> dict[str, Timing]:
    """Of "<backend> forward" and "<backend> forward_backward", in turns."""
    wanting = [tensor for tensor in given.values() if tensor is not None and tensor.requires_grad]
    plain = {name: None if tensor is None else tensor.detach() for name, tensor in given.items()}
    passes: dict[str, Callable[[], object]] = {}
    for name, function in works.items():
        weights = torch.ones_like(one.call(function, plain, device))

        def forward(function: Callable[..., Tensor] = function) -> object:
            return one.call(function, plain, device)

        def both(function: Callable[..., Tensor] = function, weights: Tensor = weights) -> object:
            return torch.autograd.grad(one.call(function, given, device), wanting, weights)

        passes |= {f"{name} forward": forward, f"{name} forward_backward": both}
    return in_turns(passes, device, seconds=seconds)


def _least_seconds(one: Sample, given: dict[str, Tensor | None], dtype: str, ceilings: dict[str, float]) -> float:
    """What the device needs for a forward pass at its measured rates."""
    tensors = [tensor for tensor in given.values() if tensor is not None]
    moved = sum(tensor.nbytes for tensor in tensors) + max(tensor.nbytes for tensor in tensors) * (one.flops > 0)
    return max(one.flops / ceilings[f"matmul_{dtype}"], moved / ceilings["memory"])


def _version(backend: Backend | None) -> str | None:
    """Of the package that carries it; torch's own where it is torch's, the compiler for C++. None = not installed."""
    if backend is CPP:
        return None if compiler() is None else identity().split(" · ")[0]
    return str(torch.__version__) if backend is None or backend.package is None else select.version(backend.package)


def show(found: dict[str, Any]) -> None:
    """The table in the terminal."""
    console = Console(highlight=False)
    console.print(tables.machine_line(found["machine"], found["ceilings"]))
    figures = ("value error", "gradient error", "forward", "ceiling", "both passes", "ceiling")
    table = tables.table("operation", "backend", "installed", "taken", *figures)
    for row in found["rows"]:
        error = row.get("error")
        table.add_row(
            row["function"],
            row["backend"],
            "no" if row["version"] is None else "yes" if row["package"] is None else row["version"],
            "yes" if row["taken"] else "no",
            *(("", "") if error is None else (f"{error['value']:.0e}", f"{error['gradient']:.0e}")),
            *_cells(row.get("forward")),
            *_cells(row.get("forward_backward")),
        )
    tables.show(table, console)
    console.print(
        f"In {found['dtype']}. Errors are relative to the fp32 reference; times are the best of several, with their shares of the "
        "measured ceiling."
    )
    refused: dict[str, list[str]] = {}
    for row in found["rows"]:
        if not row["taken"]:
            refused.setdefault(f"{row['backend']}: {row['why_not']}", []).append(row["function"])
    for why, functions in refused.items():
        console.print(f"Not taken for {', '.join(functions)}: {why}.")
    for text in found["not_measured"]:
        console.print(f"Not measured here: {text}.")


def _cells(time: dict[str, Any] | None) -> tuple[str, str]:
    return ("", "") if time is None else (tables.say_milliseconds(time["best_seconds"]), f"{100 * time['of_ceiling']:.0f} %")
