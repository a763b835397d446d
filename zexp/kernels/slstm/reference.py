"""The sLSTM cell as published, one position at a time. B batch · T positions · H heads · P head width · G the four gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def slstm(inputs_BTHGP: Tensor, recurrent_HPGR: Tensor, documents_BT: Tensor | None = None) -> Tensor:
    """h_t = o_t c_t / n_t with c_t = f_t c_{t-1} + i_t tanh(z_t), n_t = f_t n_{t-1} + i_t; f and o are sigmoids, i = exp.

    Gates f, o, i, z get inputs_t + h_{t-1} R. c and n are kept divided by exp(m_t), m_t = max(log f_t + m_{t-1}, i_t).
    Before every document h, c, n are zero and m is -inf.
    Source: xLSTM (arXiv:2405.04517), eq. (8) to (18).
    """
    batch, length, heads, _, width = inputs_BTHGP.shape
    h, c, n = (inputs_BTHGP.new_zeros(batch, heads, width) for _ in range(3))
    m = torch.full_like(h, -torch.inf)
    rows = []
    for t in range(length):
        if documents_BT is not None and t > 0:
            same = (documents_BT[:, t] == documents_BT[:, t - 1])[:, None, None].expand_as(h)
            h, c, n = (torch.where(same, state, 0.0) for state in (h, c, n))
            m = torch.where(same, m, -torch.inf)
        f, o, i, z = (inputs_BTHGP[:, t] + torch.einsum("bhp,hpgr->bhgr", h, recurrent_HPGR)).unbind(2)
        earlier = F.logsigmoid(f) + m
        m = torch.maximum(earlier, i)
        forget, added = (earlier - m).exp(), (i - m).exp()
        c, n = forget * c + added * z.tanh(), forget * n + added
        h = o.sigmoid() * c / n
        rows.append(h)
    return torch.stack(rows, dim=1)
