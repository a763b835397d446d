"""The selective scan by mamba-ssm's CUDA kernel.

B batch · T positions · I inner channels · H heads · N state size.

The kernel knows no documents. A state is forgotten where a document starts by a step so long that its decay is exactly zero in
fp32, with the input made as much smaller: S_t = exp(dt' a) S_{t-1} + dt' x' B with dt' x' = dt x. The step is a constant, so all
gradients are those of the operation. It takes fp32, in which it computes anyway: a bf16 step would be off by 0.4 %.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zexp.kernels.documents import Documents
from zexp.kernels.fused import OFFSETS, Fused

WIDEST = 256
# exp(-200) is zero in fp32, whose smallest number is exp(-103); half the way would do, and the state's size does not matter.
FORGETTING = 200.0
SLOWEST = 1e-30  # of the rates a step is made for: above what fp32 can divide by


def mamba_ssm() -> dict[str, Fused]:
    """selective_scan_fn (Gu & Dao 2023, arXiv:2312.00752)."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def run(
        x_BTI: Tensor,
        dt_BTI: Tensor,
        a_IN: Tensor,
        b_BTHN: Tensor,
        c_BTHN: Tensor,
        d_I: Tensor,
        dt_bias_I: Tensor | None = None,
        z_BTI: Tensor | None = None,
        *,
        documents: Documents | None = None,
    ) -> Tensor:
        with torch.autocast(x_BTI.device.type, enabled=False):
            x, dt, a, d = x_BTI.float(), dt_BTI.float(), a_IN.float(), d_I.float()
            if dt_bias_I is not None:
                dt = torch.nn.functional.softplus(dt + dt_bias_I)
            scanned = x
            if documents is not None:
                start_BT1 = documents.starts()[:, :, None]
                long_I = FORGETTING / a.detach().abs().amin(1).clamp(min=SLOWEST)
                scanned, dt = torch.where(start_BT1, x * (dt / long_I), x), torch.where(start_BT1, long_I, dt)
            b, c = (tensor.float().permute(0, 2, 3, 1).contiguous() for tensor in (b_BTHN, c_BTHN))
            y_BIT: Tensor = selective_scan_fn(
                scanned.transpose(1, 2).contiguous(), dt.transpose(1, 2).contiguous(), a.contiguous(), b, c
            )
            y = torch.addcmul(y_BIT.transpose(1, 2), x, d).to(x_BTI.dtype)
        return y if z_BTI is None else y * torch.nn.functional.silu(z_BTI)

    return {"selective_scan": Fused(run, refuses)}


def refuses(
    x_BTI: Tensor,
    dt_BTI: Tensor,
    a_IN: Tensor,
    b_BTHN: Tensor,
    c_BTHN: Tensor,
    d_I: Tensor,
    dt_bias_I: Tensor | None = None,
    z_BTI: Tensor | None = None,
    *,
    documents: Documents | None = None,
) -> str | None:
    """What the kernel cannot take."""
    if a_IN.shape[1] > WIDEST:
        return f"a state of {a_IN.shape[1]}, the kernel takes {WIDEST} at most"
    if x_BTI.numel() >= OFFSETS:
        return f"an array of {x_BTI.numel()} elements, beyond offsets of 32 bits"
    if x_BTI.dtype == torch.float64:
        return "inputs in float64, the kernel computes in fp32"
    return None
