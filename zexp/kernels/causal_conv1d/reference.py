"""Causal depthwise convolution, one output position at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    documents_BT: Tensor | None = None,
    *,
    silu: bool = True,
) -> Tensor:
    """silu(bias + sum over k of weight[:, k] * x[t - (K - 1 - k)]); positions of another document count as zero."""
    batch, length, channels = x_BTC.shape
    width = weight_CK.shape[1]
    rows = []
    for t in range(length):
        total = x_BTC.new_zeros(batch, channels) if bias_C is None else bias_C.expand(batch, channels)
        for k in range(width):
            s = t - (width - 1 - k)
            if s < 0:
                continue
            term = weight_CK[:, k] * x_BTC[:, s]
            if documents_BT is not None:
                term = term * (documents_BT[:, s] == documents_BT[:, t])[:, None]
            total = total + term
        rows.append(total)
    y = torch.stack(rows, dim=1)
    return F.silu(y) if silu else y
