"""RMSNorm by Liger Kernel, or by flash-linear-attention. D width."""

from __future__ import annotations

import torch
from torch import Tensor

from zexp.kernels.fused import Fused

ROW_BYTES = 65536  # of what one program of either kernel keeps


def liger_kernel() -> dict[str, Fused]:
    """LigerRMSNormFunction, with all arithmetic in fp32 and the gradient in memory of its own: ours may be read by others."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def run(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        out: Tensor = LigerRMSNormFunction.apply(x, weight_D, eps, 0.0, "gemma", False)
        return out

    return {"rms_norm": Fused(run, refuses)}


def flash_linear_attention() -> dict[str, Fused]:
    """fla.modules' rms_norm."""
    from fla.modules.norm.layernorm import rms_norm

    def run(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        out: Tensor = rms_norm(x.contiguous(), weight_D, None, eps=eps)
        return out

    return {"rms_norm": Fused(run, refuses)}


def refuses(x: Tensor, weight_D: Tensor, eps: float) -> str | None:
    """What the kernels cannot take."""
    if x.shape[-1] * x.element_size() > ROW_BYTES:
        return f"rows of {x.shape[-1] * x.element_size()} bytes, the kernel takes {ROW_BYTES} at most"
    return "inputs in float64, the kernel computes in fp32" if x.dtype == torch.float64 else None
