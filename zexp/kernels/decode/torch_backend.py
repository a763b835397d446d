"""The linear map as torch has it. I inputs · O outputs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + bias over the last dimension, (…, O)."""
    return F.linear(x, weight_OI, bias_O)
