"""Token shift, one position at a time. B batch · T positions · D width · S mixes."""

from __future__ import annotations

import torch
from torch import Tensor


def token_shift(x_BTD: Tensor, mix_SD: Tensor, documents_BT: Tensor | None = None) -> list[Tensor]:
    """For each mix vector x_t + (x_{t-1} - x_t) * mix, (B, T, D); before a document's first position stands zero.

    Source: RWKV-7 (arXiv:2503.14456), eq. of the token shift in section 4.1.
    """
    rows = []
    for t in range(x_BTD.shape[1]):
        before = torch.zeros_like(x_BTD[:, t]) if t == 0 else x_BTD[:, t - 1]
        if documents_BT is not None and t > 0:
            before = before * (documents_BT[:, t] == documents_BT[:, t - 1])[:, None]
        rows.append(x_BTD[:, t] + (before - x_BTD[:, t]) * mix_SD[:, None])
    return list(torch.stack(rows, dim=2))
