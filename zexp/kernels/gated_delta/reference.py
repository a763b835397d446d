"""The gated delta rule, one position at a time.

B batch · T positions · G key heads · N key width · H value heads (a multiple of G) · P value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6  # under the root of a query's or key's length


def gated_delta(
    q_BTGN: Tensor,
    k_BTGN: Tensor,
    v_BTHP: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    documents_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, y_t = S_t^T q_t / sqrt(N), and the last S_t.

    q and k are divided by their length first; S is (N, P) and zero before every document.
    Source: gated DeltaNet (arXiv:2412.06464), eq. (10), where S is transposed.
    """
    batch, length, groups, keys = k_BTGN.shape
    heads, values = v_BTHP.shape[2:]
    q, k = (
        (tensor / (tensor.square().sum(-1, keepdim=True) + EPS).sqrt()).repeat_interleave(heads // groups, dim=2)
        for tensor in (q_BTGN, k_BTGN)
    )
    state = v_BTHP.new_zeros(batch, heads, keys, values)
    rows = []
    for t in range(length):
        if documents_BT is not None and t > 0:
            state = state * (documents_BT[:, t] == documents_BT[:, t - 1])[:, None, None, None]
        state = state * g_BTH[:, t].exp()[..., None, None]
        error = v_BTHP[:, t] - torch.einsum("bhnp,bhn->bhp", state, k[:, t])
        state = state + torch.einsum("bh,bhn,bhp->bhnp", beta_BTH[:, t], k[:, t], error)
        rows.append(torch.einsum("bhnp,bhn->bhp", state, q[:, t]) * keys**-0.5)
    return torch.stack(rows, dim=1), state
