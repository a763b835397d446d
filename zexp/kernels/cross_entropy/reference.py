"""The loss of a linear head with all logits at once."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> Tensor:
    """Sum over the rows whose label is not -100 of -log softmax(weight hidden)[label]."""
    return F.cross_entropy(F.linear(hidden_MD, weight_VD).float(), labels_M, ignore_index=-100, reduction="sum")
