"""Causal attention on torch's scaled_dot_product_attention; on a CPU in tiles of our own.

B batch · T queries · S keys · H query heads · G key-value heads · P head width · W window · C blocks of W positions.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from zexp.kernels.attention.tiles import attention_in_tiles
from zexp.kernels.documents import Documents


def attention(
    q_BTHP: Tensor,
    k_BSGP: Tensor,
    v_BSGP: Tensor,
    *,
    scale: float,
    window: int | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """Causal attention, (B, T, H, P), in q's dtype. G divides H; query head h reads key-value head h // (H / G).

    Query t sits at key S - T + t. window: positions that a query sees, itself included; None = all before it.
    documents: a query sees its own document only (T = S); None = the whole row.
    Source: Vaswani et al. 2017 (arXiv:1706.03762), eq. (1); grouped as in arXiv:2305.13245; windowed as in
    Mistral 7B (arXiv:2310.06825), section 2.
    """
    if window is not None and window >= k_BSGP.shape[1]:
        window = None
    if q_BTHP.device.type == "cpu" and 1 < q_BTHP.shape[1] == k_BSGP.shape[1]:
        return attention_in_tiles(q_BTHP, k_BSGP, v_BSGP, scale, window, documents)
    return attention_by_torch(q_BTHP, k_BSGP, v_BSGP, scale=scale, window=window, documents=documents)


def attention_by_torch(
    q_BTHP: Tensor,
    k_BSGP: Tensor,
    v_BSGP: Tensor,
    *,
    scale: float,
    window: int | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """The same on scaled_dot_product_attention, on any device."""
    queries, keys = q_BTHP.shape[1], k_BSGP.shape[1]
    if window is not None and window >= keys:
        window = None
    if window is not None and queries == keys and 2 * window < queries:
        return _in_blocks(q_BTHP, k_BSGP, v_BSGP, scale, window, documents)
    if documents is not None:
        return _sdpa(q_BTHP, k_BSGP, v_BSGP, scale, _bias_of_documents(documents, window, q_BTHP.dtype))
    if window is not None and queries == keys:
        return _sdpa(q_BTHP, k_BSGP, v_BSGP, scale, _bias_of_window(keys, window, q_BTHP.device, q_BTHP.dtype))
    if window is not None or 1 < queries < keys:
        return _sdpa(q_BTHP, k_BSGP, v_BSGP, scale, _band(queries, keys, window, q_BTHP.device))
    return _sdpa(q_BTHP, k_BSGP, v_BSGP, scale, None, is_causal=queries == keys)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, is_causal: bool = False) -> Tensor:
    """Positions before heads in and out; `mask` broadcasts to (B, H, T, S): what is seen, or what is added to the scores."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    return out.transpose(1, 2)


def _band(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(T, S): keys at most the query's own position, and fewer than `window` before it."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries - window + 1)


# What is added to the scores, made once and taken by all layers. From a mask of booleans each layer would make a bias of
# its own and keep it for its backward pass. Evaluation may be what makes one, so they are made outside of its inference
# mode: else no backward pass could keep them.


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen` is true, -inf elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


@lru_cache(maxsize=2)
def _bias_of_window(length: int, window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(T, T)."""
    with torch.inference_mode(False):
        return _bias(_band(length, length, window, device), dtype)


@lru_cache(maxsize=2)
def _bias_of_blocks(batch: int, blocks: int, window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(B·C, 1, W, 2W)."""
    with torch.inference_mode(False):
        return _bias(_band_in_blocks(blocks, window, device).repeat(batch, 1, 1), dtype)[:, None]


def _bias_of_documents(documents: Documents, window: int | None, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T)."""
    ids_BT = documents.ids_BT

    def make() -> Tensor:
        seen = ids_BT[:, :, None] == ids_BT[:, None, :]
        return _bias(seen & _band(ids_BT.shape[1], ids_BT.shape[1], window, ids_BT.device), dtype)[:, None]

    return documents.once(("attention", window, dtype), make)


def _bias_of_documents_in_blocks(documents: Documents, window: int, dtype: torch.dtype) -> Tensor:
    """(B·C, 1, W, 2W)."""

    def make() -> Tensor:
        ids_BCW = documents.padded(window).unflatten(1, (-1, window))
        before = torch.cat((ids_BCW[:, :1], ids_BCW[:, :-1]), dim=1)
        same = ids_BCW[..., :, None] == torch.cat((before, ids_BCW), dim=2)[..., None, :]
        seen = same & _band_in_blocks(ids_BCW.shape[1], window, ids_BCW.device)
        return _bias(seen.flatten(0, 1), dtype)[:, None]

    return documents.once(("attention in blocks", window, dtype), make)


def _band_in_blocks(blocks: int, window: int, device: torch.device) -> Tensor:
    """(C, W, 2W): what queries of a block see of its own keys and those of the block before."""
    seen = _band(window, 2 * window, window, device).repeat(blocks, 1, 1)
    seen[0, :, :window] = False  # there is no block before the first
    return seen


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, documents: Documents | None) -> Tensor:
    """Queries in blocks of W, each against its own block of keys and the one before: T · 2W scores, not T²."""
    batch, length = q.shape[:2]
    blocks = -(-length // window)
    padding = blocks * window - length

    def cut(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, 0, 0, 0, 0, padding)).unflatten(1, (blocks, window))

    def with_previous(tensor: Tensor) -> Tensor:
        parts = cut(tensor)
        previous = F.pad(parts[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        return torch.cat((previous, parts), dim=2).flatten(0, 1)

    if documents is None:
        bias = _bias_of_blocks(batch, blocks, window, q.device, q.dtype)
    else:
        bias = _bias_of_documents_in_blocks(documents, window, q.dtype)
    out = _sdpa(cut(q).flatten(0, 1), with_previous(k), with_previous(v), scale, bias)
    return out.unflatten(0, (batch, blocks)).flatten(1, 2)[:, :length]
