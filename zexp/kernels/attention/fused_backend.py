"""Causal attention by flash-attn, or by what torch brings of the same kind.

B batch · T positions · H query heads · G key-value heads · P head width.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zexp.kernels.documents import Documents
from zexp.kernels.fused import Fused, ends_of, not_sixteen_bit

WIDEST = 256


def flash_attn() -> dict[str, Fused]:
    """flash-attn 2 (Dao 2023, arXiv:2307.08691)."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    def run(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, documents: Documents | None = None
    ) -> Tensor:
        options: dict[str, Any] = {
            "softmax_scale": scale,
            "causal": True,
            "window_size": _before(window),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        if documents is None:
            out: Tensor = flash_attn_func(q, k, v, **options)
            return out
        ends, longest = documents.ends()
        parts = (tensor.flatten(0, 1) for tensor in (q, k, v))
        packed: Tensor = flash_attn_varlen_func(*parts, ends, ends, longest, longest, **options)
        return packed.unflatten(0, q.shape[:2])

    return {"attention": Fused(run, refuses)}


def torch_flash() -> dict[str, Fused]:
    """torch's scaled_dot_product_attention by its flash kernels, and torch.nn.attention.varlen for packed or windowed rows."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.varlen import varlen_attn

    windows = "window_size" in inspect.signature(varlen_attn).parameters

    def run(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, documents: Documents | None = None
    ) -> Tensor:
        grouped = k.shape[2] != q.shape[2]
        if documents is None and _before(window) == (-1, -1):
            # cuDNN's is the faster of the two on Hopper, and its backward pass is not deterministic.
            kinds = [SDPBackend.FLASH_ATTENTION]
            if not torch.are_deterministic_algorithms_enabled():
                kinds.insert(0, SDPBackend.CUDNN_ATTENTION)
            with sdpa_kernel(kinds, set_priority=True):
                out = F.scaled_dot_product_attention(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=scale, enable_gqa=grouped
                )
            return out.transpose(1, 2)
        ends, longest = ends_of(documents, q)
        causal = {"window_size": (_before(window)[0], 0)} if windows else {"is_causal": True}
        options: dict[str, Any] = {"scale": scale} | causal | ({"enable_gqa": True} if grouped else {})
        packed = varlen_attn(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), ends, ends, longest, longest, **options)
        assert isinstance(packed, Tensor), "no auxiliary output was asked for"
        return packed.unflatten(0, q.shape[:2])

    def refuses_here(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, documents: Documents | None = None
    ) -> str | None:
        if window is not None and not windows:
            return "a window, which this torch's varlen_attn does not have"
        if q.shape[3] % 8:
            return f"heads of {q.shape[3]} channels, the kernel takes multiples of 8"
        return refuses(q, k, v, scale=scale, window=window, documents=documents)

    return {"attention": Fused(run, refuses_here)}


def refuses(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, documents: Documents | None = None
) -> str | None:
    """What flash kernels cannot take."""
    if q.shape[1] != k.shape[1]:
        return "queries that continue a cache"
    if q.shape[3] > WIDEST:
        return f"heads of {q.shape[3]} channels, the kernel takes {WIDEST} at most"
    return not_sixteen_bit(q, k, v)


def _before(window: int | None) -> tuple[int, int]:
    """Keys before and after a query that it sees besides its own; -1 = all."""
    return (-1, -1) if window is None else (window - 1, 0)
