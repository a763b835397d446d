"""The mLSTM cell, one position at a time. B batch · T positions · H heads · N key width · P value width."""

from __future__ import annotations

import torch
from torch import Tensor


def mlstm(
    q_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHP: Tensor,
    input_BTH: Tensor,
    log_forget_BTH: Tensor,
    *,
    scale: float,
    eps: float,
    documents_BT: Tensor | None = None,
    constant_stabiliser: bool = False,
) -> Tensor:
    """C_t = f_t C_{t-1} + i_t k_t v_t^T, n_t = f_t n_{t-1} + i_t k_t, h_t = C_t^T q_t / max(|n_t q_t|, 1); i = exp(input).

    It is computed with exp(-m_t) times C_t and n_t, where m_t = max(log f_t + m_{t-1}, input_t) and m_0 = 0; eps is added to
    the denominator then. C, n and m are zero before every document. constant_stabiliser: no gradient passes through m, which
    cancels in h but for eps.
    Source: xLSTM (arXiv:2405.04517), eq. (19) to (27) with the stabilisation of eq. (15) to (17).
    """
    batch, length, heads, width = q_BTHN.shape
    memory = q_BTHN.new_zeros(batch, heads, width, v_BTHP.shape[3])
    normaliser, m = q_BTHN.new_zeros(batch, heads, width), q_BTHN.new_zeros(batch, heads)
    rows = []
    for t in range(length):
        if documents_BT is not None and t > 0:
            same_B = documents_BT[:, t] == documents_BT[:, t - 1]
            memory, normaliser = memory * same_B[:, None, None, None], normaliser * same_B[:, None, None]
            m = m * same_B[:, None]
        earlier = m + log_forget_BTH[:, t]
        m = torch.maximum(earlier, input_BTH[:, t])
        m = m.detach() if constant_stabiliser else m
        forget, added = (earlier - m).exp()[..., None], (input_BTH[:, t] - m).exp()[..., None]
        key = added * k_BTHN[:, t]
        memory = memory * forget[..., None] + torch.einsum("bhn,bhp->bhnp", key, v_BTHP[:, t])
        normaliser = normaliser * forget + key
        query = scale * q_BTHN[:, t]
        below = torch.maximum((normaliser * query).sum(-1).abs(), (-m).exp())
        rows.append(torch.einsum("bhnp,bhn->bhp", memory, query) / (below + eps)[..., None])
    return torch.stack(rows, dim=1)
