"""Retention in its recurrent and in its parallel form.

B batch · T positions · H heads · N key width · P value width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def retention(
    q_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHP: Tensor,
    log_decays: Sequence[float],
    *,
    scale: float,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """S_t = gamma S_{t-1} + k_t v_t^T, y_t = scale S_t^T q_t, one position at a time; S is zero before every document.

    Source: RetNet (arXiv:2307.08621), eq. (6).
    """
    batch, length, heads, width = q_BTHN.shape
    gamma_H = torch.tensor(list(log_decays), dtype=torch.float64).exp().to(q_BTHN.dtype)
    state = q_BTHN.new_zeros(batch, heads, width, v_BTHP.shape[3])
    rows = []
    for t in range(length):
        if documents_BT is not None and t > 0:
            state = state * (documents_BT[:, t] == documents_BT[:, t - 1])[:, None, None, None]
        state = state * gamma_H[:, None, None] + torch.einsum("bhn,bhp->bhnp", k_BTHN[:, t], v_BTHP[:, t])
        rows.append(scale * torch.einsum("bhnp,bhn->bhp", state, q_BTHN[:, t]))
    return torch.stack(rows, dim=1)


def retention_parallel(
    q_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHP: Tensor,
    log_decays: Sequence[float],
    *,
    scale: float,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """(scale Q K^T * D) V with D_ts = gamma^(t - s) for s <= t in one document, else 0. Source: eq. (5)."""
    length = q_BTHN.shape[1]
    distance_TS = torch.arange(length)[:, None] - torch.arange(length)
    decay_HTS = (torch.tensor(list(log_decays), dtype=q_BTHN.dtype)[:, None, None] * distance_TS.clamp(min=0)).exp()
    weights_BHTS = scale * torch.einsum("bthn,bshn->bhts", q_BTHN, k_BTHN) * decay_HTS * (distance_TS >= 0)
    if documents_BT is not None:
        weights_BHTS = weights_BHTS * (documents_BT[:, None, :, None] == documents_BT[:, None, None, :])
    return torch.einsum("bhts,bshp->bthp", weights_BHTS, v_BTHP)
