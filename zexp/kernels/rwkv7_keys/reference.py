"""RWKV-7's keys, written as their formulas. H heads · N key width; k and a are (…, H, N)."""

from __future__ import annotations

from torch import Tensor


def rwkv7_keys(k: Tensor, a: Tensor, k_k_HN: Tensor, k_a_HN: Tensor) -> tuple[Tensor, Tensor]:
    """The written key k * (1 + (a - 1) * k_a) and the removal key k * k_k over its norm, per head.

    Source: RWKV-7 (arXiv:2503.14456), section 4.1 (replacement key, removal key).
    """
    removal = k * k_k_HN
    return k * (1 + (a - 1) * k_a_HN), removal / removal.norm(dim=-1, keepdim=True)
