"""Causal attention with the whole score matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q_BTHP: Tensor,
    k_BSGP: Tensor,
    v_BSGP: Tensor,
    *,
    scale: float,
    window: int | None = None,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over the keys at most the query's position (S - T + t), fewer than `window` before it,
    and of the same document.  Source: Vaswani et al. 2017, eq. (1).
    """
    repeats = q_BTHP.shape[2] // k_BSGP.shape[2]
    k, v = k_BSGP.repeat_interleave(repeats, dim=2), v_BSGP.repeat_interleave(repeats, dim=2)
    scores = torch.einsum("bthp,bshp->bhts", q_BTHP, k) * scale
    queries, keys = q_BTHP.shape[1], k.shape[1]
    position = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)
    hidden = key > position
    if window is not None:
        hidden = hidden | (position - key >= window)
    if documents_BT is not None:
        hidden = hidden | (documents_BT[:, None, :, None] != documents_BT[:, None, None, :])
    return torch.einsum("bhts,bshp->bthp", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
