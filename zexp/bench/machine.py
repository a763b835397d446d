"""The machine and its ceilings, measured: how fast it multiplies matrices and moves memory."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from typing import Any

import torch

from zexp.bench.timing import timed
from zexp.train.fingerprint import device_model

# (rows, inner, columns): the best of them counts. Those of a GPU fill it, those of a CPU fit its caches.
SHAPES = {"cpu": ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048)), "cuda": ((8192, 8192, 8192), (16384, 8192, 8192))}
_REPEATS, _PATIENCE = 4, 5  # of a product that is timed, at least; how many times its seconds they may take
COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}  # larger than the caches


def facts(device: torch.device | str) -> dict[str, Any]:
    """What a result was measured on: device, threads, versions, date."""
    where = torch.device(device)
    about: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_model(where.type),
        "kind": where.type,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if where.type == "cuda":
        properties = torch.cuda.get_device_properties(where)
        about |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return about


def matmul_flops_per_second(device: torch.device | str, dtype: torch.dtype, *, seconds: float = 1.0) -> float:
    """The best rate of a product of two matrices.

    A larger product is left out where it would take too long by the rate of the smaller ones: a CPU without instructions for bf16
    multiplies it at one GFLOP/s, at every size.
    """
    kind = torch.device(device).type
    best = 0.0
    for rows, inner, columns in SHAPES[kind]:
        if best and _REPEATS * 2 * rows * inner * columns / best > _PATIENCE * seconds:
            break
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(inner, columns, device=device).to(dtype)
        took = timed(lambda left=left, right=right: left @ right, device, seconds=seconds / len(SHAPES[kind]))  # type: ignore[misc]
        best = max(best, 2 * rows * inner * columns / took.best)
    return best


def memory_bytes_per_second(device: torch.device | str) -> float:
    """The best rate at which memory is read and written: a copy moves every byte twice."""
    source = torch.ones(COPIED_BYTES[torch.device(device).type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), device).best


def ceilings(device: torch.device | str) -> dict[str, float]:
    """matmul_fp32, matmul_bf16 (FLOP/s), memory (bytes/s)."""
    return {
        "matmul_fp32": matmul_flops_per_second(device, torch.float32),
        "matmul_bf16": matmul_flops_per_second(device, torch.bfloat16),
        "memory": memory_bytes_per_second(device),
    }
