"""The loss of a linear head by Liger Kernel (arXiv:2410.10989). M tokens · D model width · V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from zexp.kernels.cross_entropy.torch_backend import IGNORED
from zexp.kernels.fused import Fused


def liger_kernel() -> dict[str, Fused]:
    """LigerFusedLinearCrossEntropyFunction. The head's gradient is summed in fp32 and then rounded to the products' dtype."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def run(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, softcap: float | None = None) -> Tensor:
        device = hidden_MD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_MD.dtype
        with torch.autocast(device, enabled=False):
            loss: Tensor = LigerFusedLinearCrossEntropyFunction.apply(
                hidden_MD.to(dtype),
                weight_VD.to(dtype),
                labels_M,
                None,  # bias
                None,  # weights of the classes
                IGNORED,
                0.0,  # of the squared log-sum
                0.0,  # label smoothing
                "sum",
                softcap,
                False,  # return the squared log-sum
                torch.float32,  # sums of the head's gradient
            )[0]
        return loss

    return {"linear_cross_entropy": Fused(run, refuses)}


def refuses(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, softcap: float | None = None) -> str | None:
    """What the kernel cannot take."""
    return "inputs in float64, the kernel computes in fp32" if hidden_MD.dtype == torch.float64 else None
