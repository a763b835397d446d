"""The gated norm per head, written as its formula."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def head_norm(
    x_BTHP: Tensor,
    weight: Tensor,
    eps: float,
    *,
    centred: bool = False,
    gate_BTI: Tensor | None = None,
    activation: Literal["silu", "sigmoid"] = "silu",
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) of each head, or x / sqrt(mean square + eps), times weight and act(gate)."""
    x = x_BTHP - x_BTHP.mean(-1, keepdim=True) if centred else x_BTHP
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    scaled = (normed * weight if weight.dim() == 1 else normed * weight[None, None]).flatten(2)
    if gate_BTI is None:
        return scaled
    return scaled * (F.silu(gate_BTI) if activation == "silu" else gate_BTI.sigmoid())
