"""Causal attention with the whole score matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q_BTHP: Tensor, k_BTGP: Tensor, v_BTGP: Tensor, *, scale: float, documents_BT: Tensor | None = None
) -> Tensor:
    """softmax(scale q k^T) v over the keys s <= t of the same document.  Source: Vaswani et al. 2017, eq. (1)."""
    repeats = q_BTHP.shape[2] // k_BTGP.shape[2]
    k, v = k_BTGP.repeat_interleave(repeats, dim=2), v_BTGP.repeat_interleave(repeats, dim=2)
    scores = torch.einsum("bthp,bshp->bhts", q_BTHP, k) * scale
    length = q_BTHP.shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    if documents_BT is not None:
        hidden = hidden | (documents_BT[:, None, :, None] != documents_BT[:, None, None, :])
    return torch.einsum("bhts,bshp->bthp", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
