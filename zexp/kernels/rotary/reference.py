"""Rotary position embedding as multiplication of complex numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x_BTHP: Tensor, theta: float, *, turned: int | None = None, start: int = 0) -> Tensor:
    """Channel pairs (i, i + R/2) of a head's first R as complex numbers times exp(1j * (start + t) * theta^(-2i/R))."""
    _, length, _, width = x_BTHP.shape
    width = width if turned is None else turned
    half = width // 2
    pairs = torch.complex(x_BTHP[..., :half].double(), x_BTHP[..., half:width].double())
    frequencies = theta ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(start, start + length, dtype=torch.float64)[:, None, None] * frequencies
    rotated = pairs * torch.polar(torch.ones_like(angles), angles)
    passed = x_BTHP[..., width:].double()
    return torch.cat((rotated.real, rotated.imag, passed), dim=-1).to(x_BTHP.dtype)
