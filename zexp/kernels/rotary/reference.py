"""Rotary position embedding as multiplication of complex numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x_BTHP: Tensor, theta: float) -> Tensor:
    """Channel pairs (i, i + P/2) as complex numbers times exp(1j * t * theta^(-2i/P))."""
    _, length, _, width = x_BTHP.shape
    half = width // 2
    pairs = torch.complex(x_BTHP[..., :half].double(), x_BTHP[..., half:].double())
    frequencies = theta ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(length, dtype=torch.float64)[:, None, None] * frequencies
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1).to(x_BTHP.dtype)
