"""The causal depthwise convolution by the package causal-conv1d, or by flash-linear-attention's Triton kernel.

B batch · T positions · C channels · K conv width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zexp.kernels.documents import Documents
from zexp.kernels.fused import OFFSETS, Fused, extent, one_row

WIDTHS = (2, 3, 4)
ALIGNED = 8  # channels: what the kernel loads at once, where a position's channels lie side by side


def causal_conv1d() -> dict[str, Fused]:
    """The CUDA kernel of Dao-AILab/causal-conv1d."""
    from causal_conv1d import causal_conv1d_fn

    def run(
        x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, documents: Documents | None = None, *, silu: bool = True
    ) -> Tensor:
        if x_BTC.stride(2) != 1 or any(stride % ALIGNED for stride in x_BTC.stride()[:2]) or x_BTC.storage_offset() % ALIGNED:
            x_BTC = x_BTC.contiguous()
        with torch.autocast(x_BTC.device.type, enabled=False):
            y_BCT: Tensor = causal_conv1d_fn(
                x_BTC.transpose(1, 2),
                weight_CK.contiguous(),
                bias_C,
                seq_idx=None if documents is None else documents.positions(),
                activation="silu" if silu else None,
            )
        return y_BCT.transpose(1, 2)

    def refuses(
        x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, documents: Documents | None = None, *, silu: bool = True
    ) -> str | None:
        if weight_CK.shape[1] not in WIDTHS:
            return f"a convolution over {weight_CK.shape[1]} positions, the kernel takes 2 to 4"
        if x_BTC.shape[2] % ALIGNED:
            return f"{x_BTC.shape[2]} channels, the kernel takes multiples of {ALIGNED}"
        return _refuses_any(x_BTC)

    return {"causal_conv1d": Fused(run, refuses)}


def flash_linear_attention() -> dict[str, Fused]:
    """The Triton kernel of fla.modules."""
    from fla.modules.causal_conv1d import causal_conv1d

    def run(
        x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, documents: Documents | None = None, *, silu: bool = True
    ) -> Tensor:
        (x,), ends = one_row(documents, x_BTC)
        with torch.autocast(x.device.type, enabled=False):
            y, _ = causal_conv1d(x, weight_CK, bias_C, activation="silu" if silu else None, cu_seqlens=ends)
        out: Tensor = y.view(x_BTC.shape)
        return out

    def refuses(
        x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, documents: Documents | None = None, *, silu: bool = True
    ) -> str | None:
        return _refuses_any(x_BTC)

    return {"causal_conv1d": Fused(run, refuses)}


def _refuses_any(x_BTC: Tensor) -> str | None:
    if x_BTC.dtype == torch.float64:
        return "inputs in float64, the kernel computes in fp32"
    return f"an array of {extent(x_BTC)} elements, beyond offsets of 32 bits" if extent(x_BTC) >= OFFSETS else None
