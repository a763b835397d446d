"""The loss of a linear head with all logits at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, softcap: float | None = None
) -> Tensor:
    """Sum over the rows whose label is not -100 of -log softmax(logits)[label], with logits = weight hidden, or
    c · tanh(weight hidden / c) with a softcap c.
    """
    logits = F.linear(hidden_MD, weight_VD).float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels_M, ignore_index=-100, reduction="sum")
