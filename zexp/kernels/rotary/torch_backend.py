"""Rotary position embedding, rotate-half. B batch · T positions · H heads · P head width · R turned channels of a head."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from zexp.kernels.rotary.scaling import RopeScaling


def rotary(
    x_BTHP: Tensor, theta: float, *, turned: int | None = None, start: int = 0, scaling: RopeScaling | None = None
) -> Tensor:
    """x with channel pairs (i, i + R/2) turned by (start + t) * theta^(-2i/R), in x's dtype.

    turned: R, even; the first R channels of a head are turned, the others pass; None = all P.
    start: the position of x's first row. Positions count from the start of the row, across documents: attention only
    sees differences.
    Source: Su et al. 2021 (arXiv:2104.09864), eq. (34), in the pairing of Llama; the partial form of GPT-NeoX.
    """
    width = x_BTHP.shape[3] if turned is None else turned
    cos, sin = angles(start, x_BTHP.shape[1], width, theta, scaling, x_BTHP.device, x_BTHP.dtype)
    first, second = x_BTHP[..., : width // 2], x_BTHP[..., width // 2 : width]
    parts = (first * cos - second * sin, second * cos + first * sin, x_BTHP[..., width:])
    return torch.cat(parts[:2] if width == x_BTHP.shape[3] else parts, dim=-1)


def angles(
    start: int, length: int, width: int, theta: float, scaling: RopeScaling | None, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles of `length` positions from `start`, (T, 1, R/2), side by side."""
    end = start + length
    room = max(256, 1 << (end - 1).bit_length()) if start else end  # decoding: one table for many starts
    cos, sin = _table(room, width, theta, scaling, device, dtype)
    return cos[start:end], sin[start:end]


def frequencies(width: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians a position of each pair, (R/2) in fp64."""
    freq = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    if scaling is None:
        return freq
    turns = scaling.original_positions * freq / (2 * math.pi)
    blend = ((turns - scaling.low_turns) / (scaling.high_turns - scaling.low_turns)).clamp(0, 1)
    return freq * (blend + (1 - blend) / scaling.factor)


@lru_cache(maxsize=8)
def _table(
    length: int, width: int, theta: float, scaling: RopeScaling | None, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, 1, R/2). Angles are taken in fp64: position 100000 times a rounded fp32 frequency is off by 0.01."""
    with torch.inference_mode(False), torch.no_grad():  # evaluation may be what makes it, and training what keeps it
        positions = torch.arange(length, dtype=torch.float64, device=device)
        angles = torch.outer(positions, frequencies(width, theta, scaling).to(device))[:, None, :]
        return angles.cos().to(dtype), angles.sin().to(dtype)
