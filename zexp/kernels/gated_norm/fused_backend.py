"""Gated RMSNorm by mamba-ssm's Triton kernel, or by the one that flash-linear-attention has of it. I inner width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zexp.kernels.fused import Fused, without_init

ROW_BYTES = 65536  # of what one program of the kernel keeps


def mamba_ssm() -> dict[str, Fused]:
    """mamba_ssm.ops.triton.layernorm_gated."""
    without_init("mamba_ssm", "selective_scan_cuda")
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return _both(rmsnorm_fn)


def flash_linear_attention() -> dict[str, Fused]:
    """fla.modules.norm.layernorm_gated."""
    from fla.modules.norm.layernorm_gated import rmsnorm_fn

    return _both(rmsnorm_fn)


def _both(rmsnorm_fn: Callable[..., Any]) -> dict[str, Fused]:
    def run(before_gate: bool) -> Callable[..., Tensor]:
        def norm(y: Tensor, z: Tensor, weight_I: Tensor, eps: float, groups: int) -> Tensor:
            out: Tensor = rmsnorm_fn(
                y, weight_I, None, z=z, eps=eps, group_size=y.shape[-1] // groups, norm_before_gate=before_gate
            )
            return out

        return norm

    return {"gated_norm": Fused(run(False), refuses), "norm_gated": Fused(run(True), refuses)}


def refuses(y: Tensor, z: Tensor, weight_I: Tensor, eps: float, groups: int) -> str | None:
    """What the kernel cannot take."""
    row = y.shape[-1] // groups * y.element_size()
    if row > ROW_BYTES:
        return f"rows of {row} bytes, the kernel takes {ROW_BYTES} at most"
    return "inputs in float64, the kernel computes in fp32" if y.dtype == torch.float64 else None
