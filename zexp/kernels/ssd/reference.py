"""The state-space recurrence, one position at a time.

B batch · T positions · H heads · P head width · G groups · N state size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    d_H: Tensor,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """S_t = exp(dt_t a) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + d x_t; S is zero before every document.

    Source: Mamba-2 (arXiv:2405.21060), eq. (1) with a scalar A per head, discretised as in its section 7.
    """
    batch, length, heads, width = x_BTHP.shape
    repeats = heads // b_BTGN.shape[2]
    b, c = b_BTGN.repeat_interleave(repeats, dim=2), c_BTGN.repeat_interleave(repeats, dim=2)
    state = x_BTHP.new_zeros(batch, heads, width, b.shape[-1])
    rows = []
    for t in range(length):
        if documents_BT is not None and t > 0:
            state = state * (documents_BT[:, t] == documents_BT[:, t - 1])[:, None, None, None]
        decay = torch.exp(dt_BTH[:, t] * a_H)
        added = torch.einsum("bh,bhp,bhn->bhpn", dt_BTH[:, t], x_BTHP[:, t], b[:, t])
        state = state * decay[:, :, None, None] + added
        rows.append(torch.einsum("bhpn,bhn->bhp", state, c[:, t]) + d_H[:, None] * x_BTHP[:, t])
    return torch.stack(rows, dim=1)
