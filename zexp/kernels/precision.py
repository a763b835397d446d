"""Arithmetic inside an operation is at least fp32, whatever its inputs are."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or unchanged if it already is fp32 or fp64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
