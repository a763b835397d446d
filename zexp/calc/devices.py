"""Accelerators: peak FLOP/s by precision (dense, not with 2:4 sparsity), memory, memory bandwidth."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Device:
    """flops: peak FLOP/s of matrix products, by precision (fp32 without TF32). memory: bytes. bandwidth: bytes a second.
    source: where the figures stand.
    """

    flops: Mapping[str, float]
    memory: float
    bandwidth: float
    source: str


def _device(source: str, memory_gb: float, bandwidth_gb: float, **tera: float) -> Device:
    return Device(
        flops={precision: value * 1e12 for precision, value in tera.items()},
        memory=memory_gb * 1e9,
        bandwidth=bandwidth_gb * 1e9,
        source=source,
    )


DEVICES = {
    "a10": _device("NVIDIA A10 datasheet", 24, 600, bf16=125.0, tf32=62.5, fp32=31.2),
    "a100": _device("NVIDIA A100 datasheet, 80GB SXM", 80, 2039, bf16=312.0, tf32=156.0, fp32=19.5),
    "a100_40gb": _device("NVIDIA A100 datasheet, 40GB SXM", 40, 1555, bf16=312.0, tf32=156.0, fp32=19.5),
    "b200": _device("NVIDIA HGX B200 datasheet, an eighth of it", 180, 7700, fp8=4500.0, bf16=2250.0, tf32=1100.0, fp32=75.0),
    "h100": _device("NVIDIA H100 architecture white paper, SXM5", 80, 3350, fp8=1978.9, bf16=989.4, tf32=494.7, fp32=66.9),
    "h100_pcie": _device("NVIDIA H100 architecture white paper, PCIe", 80, 2039, fp8=1513.0, bf16=756.0, tf32=378.0, fp32=51.2),
    "h200": _device("NVIDIA H200 datasheet, SXM", 141, 4800, fp8=1978.9, bf16=989.4, tf32=494.7, fp32=66.9),
    "l40s": _device("NVIDIA L40S datasheet", 48, 864, fp8=733.0, bf16=362.05, tf32=183.0, fp32=91.6),
    "mi300x": _device("AMD Instinct MI300X data sheet", 192, 5300, fp8=2614.9, bf16=1307.4, tf32=653.7, fp32=163.4),
    "rtx4090": _device("NVIDIA Ada architecture white paper, fp32 accumulation", 24, 1008, bf16=165.2, tf32=82.6, fp32=82.6),
}

# What vendors' tools call them (nvidia-smi, torch), without the words that differ between tools. Cards that are not
# listed (A10G, H100 NVL, GH200, a MIG instance) have other figures and are nobody's twin.
_NAMES = {
    "a10": "a10",
    "a100 80gb pcie": "a100",
    "a100 pcie 40gb": "a100_40gb",
    "a100 pcie 80gb": "a100",
    "a100 sxm4 40gb": "a100_40gb",
    "a100 sxm4 80gb": "a100",
    "b200": "b200",
    "h100 80gb hbm3": "h100",
    "h100 pcie": "h100_pcie",
    "h200": "h200",
    "instinct mi300x": "mi300x",
    "l40s": "l40s",
    "geforce rtx 4090": "rtx4090",
}


def named(name: str) -> str | None:
    """The key of DEVICES that a vendor's name ('NVIDIA H100 80GB HBM3'), or the key itself, means. None if there is none."""
    if name.lower() in DEVICES:
        return name.lower()
    words = re.split(r"[\s_-]+", name.lower())
    return _NAMES.get(" ".join(word for word in words if word not in ("nvidia", "amd")))
