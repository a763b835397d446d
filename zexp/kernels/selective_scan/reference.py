"""The selective state space of Mamba-1, one position at a time.

B batch · T positions · I inner channels · H heads · P channels of a head (I / H) · N state size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan(
    x_BTI: Tensor,
    dt_BTI: Tensor,
    a_IN: Tensor,
    b_BTHN: Tensor,
    c_BTHN: Tensor,
    d_I: Tensor,
    dt_bias_I: Tensor | None = None,
    z_BTI: Tensor | None = None,
    documents_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (B, T, I) and the last state (B, I, N): S_t = exp(dt_t a) S_{t-1} + dt_t x_t B_t, y_t = S_t C_t + d x_t.

    S is zero before every document; the channels of a head share its B and C. With dt_bias, dt is softplus(dt + dt_bias);
    with z, y is multiplied by silu(z).
    Source: Mamba (arXiv:2312.00752), eq. (2a), (2b) and algorithm 2, with A discretised by eq. (4) and B as dt B, its
    first-order form, which the published code uses.
    """
    batch, length, inner = x_BTI.shape
    if dt_bias_I is not None:
        dt_BTI = torch.nn.functional.softplus(dt_BTI + dt_bias_I)
    width = inner // b_BTHN.shape[2]
    b_BTIN, c_BTIN = b_BTHN.repeat_interleave(width, dim=2), c_BTHN.repeat_interleave(width, dim=2)
    state_BIN = x_BTI.new_zeros(batch, inner, a_IN.shape[1])
    rows = []
    for t in range(length):
        if documents_BT is not None and t > 0:
            state_BIN = state_BIN * (documents_BT[:, t] == documents_BT[:, t - 1])[:, None, None]
        written_BI = dt_BTI[:, t] * x_BTI[:, t]
        state_BIN = state_BIN * torch.exp(dt_BTI[:, t, :, None] * a_IN) + written_BI[..., None] * b_BTIN[:, t]
        rows.append((state_BIN * c_BTIN[:, t]).sum(-1) + d_I * x_BTI[:, t])
    y = torch.stack(rows, dim=1)
    return (y if z_BTI is None else y * torch.nn.functional.silu(z_BTI)), state_BIN
