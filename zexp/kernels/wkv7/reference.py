"""RWKV-7's recurrence, one position at a time. B batch · T positions · H heads · N key width · P value width."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_decay(x: Tensor) -> Tensor:
    """-exp(-1/2) sigmoid(x): the logarithm of RWKV-7's decay (arXiv:2503.14456, section 4.1)."""
    return -math.exp(-0.5) / (1 + torch.exp(-x))


def wkv7(
    r_BTHN: Tensor,
    w_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHP: Tensor,
    kappa_BTHN: Tensor,
    a_BTHN: Tensor,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """S_t = (diag(exp(w_t)) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T, y_t = S_t^T r_t, (B, T, H, P).

    S is (N, P), zero before every document. Source: RWKV-7 (arXiv:2503.14456), section 4.1, whose state is transposed.
    """
    batch, length, heads, width = r_BTHN.shape
    state = r_BTHN.new_zeros(batch, heads, width, v_BTHP.shape[-1])
    rows = []
    for t in range(length):
        if documents_BT is not None and t > 0:
            state = state * (documents_BT[:, t] == documents_BT[:, t - 1])[:, None, None, None]
        found = torch.einsum("bhn,bhnp->bhp", kappa_BTHN[:, t], state)
        state = w_BTHN[:, t].exp()[..., None] * state
        state = state - torch.einsum("bhn,bhp->bhnp", a_BTHN[:, t] * kappa_BTHN[:, t], found)
        state = state + torch.einsum("bhn,bhp->bhnp", k_BTHN[:, t], v_BTHP[:, t])
        rows.append(torch.einsum("bhn,bhnp->bhp", r_BTHN[:, t], state))
    return torch.stack(rows, dim=1)
