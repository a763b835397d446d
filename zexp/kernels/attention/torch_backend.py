"""Causal attention on torch's scaled_dot_product_attention.

B batch · T queries · S keys · H query heads · G key-value heads · P head width · W window · C blocks of W positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    queries, keys = q_BTHP.shape[1], k_BSGP.shape[1]
    if window is not None and window >= keys:
        window = None
    if window is not None and queries == keys and 2 * window < queries:
        return _in_blocks(q_BTHP, k_BSGP, v_BSGP, scale, window, documents)
    if documents is not None:
        if window is None:
            return _sdpa(q_BTHP, k_BSGP, v_BSGP, scale, documents.causal_bias(q_BTHP.dtype)[:, None])
        mask = documents.causal_mask_BTT[:, None] & _band(queries, keys, window, q_BTHP.device)
        return _sdpa(q_BTHP, k_BSGP, v_BSGP, scale, mask)
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

    mask = _band(window, 2 * window, window, q.device).expand(batch, blocks, window, 2 * window).clone()
    mask[:, 0, :, :window] = False  # there is no block before the first
    if documents is not None:
        ids_BCW = F.pad(documents.ids_BT, (0, padding), value=-1).unflatten(1, (blocks, window))
        before = torch.cat((ids_BCW[:, :1], ids_BCW[:, :-1]), dim=1)
        mask &= ids_BCW[..., :, None] == torch.cat((before, ids_BCW), dim=2)[..., None, :]
    out = _sdpa(cut(q).flatten(0, 1), with_previous(k), with_previous(v), scale, mask.flatten(0, 1)[:, None])
    return out.unflatten(0, (batch, blocks)).flatten(1, 2)[:, :length]
