"""Rotary position embedding, rotate-half. B batch · T positions · H heads · P head width."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def rotary(x_BTHP: Tensor, theta: float) -> Tensor:
    """x with channel pairs (i, i + P/2) turned by t * theta^(-2i/P), in x's dtype. P is even.

    Positions count from the start of the row, across documents: attention only sees differences.
    Source: Su et al. 2021 (arXiv:2104.09864), eq. (34), in the pairing of Llama.
    """
    cos, sin = _table(x_BTHP.shape[1], x_BTHP.shape[3], theta, x_BTHP.device, x_BTHP.dtype)
    first, second = x_BTHP.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@lru_cache(maxsize=8)
def _table(length: int, width: int, theta: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, 1, P/2). Angles are taken in fp64: position 100000 times a rounded fp32 frequency is off by 0.01."""
    with torch.no_grad():
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
        angles = torch.outer(torch.arange(length, dtype=torch.float64, device=device), theta**-exponents)[:, None, :]
        return angles.cos().to(dtype), angles.sin().to(dtype)
