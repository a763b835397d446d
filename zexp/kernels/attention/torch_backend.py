"""Causal attention on torch's scaled_dot_product_attention.

B batch · T positions · H query heads · G key-value heads · P head width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from zexp.kernels.documents import Documents


def attention(
    q_BTHP: Tensor, k_BTGP: Tensor, v_BTGP: Tensor, *, scale: float, documents: Documents | None = None
) -> Tensor:
    """Causal attention, (B, T, H, P), in q's dtype. G divides H; query head h reads key-value head h // (H / G).

    documents: a query sees its own document only; None = the whole row.
    Source: Vaswani et al. 2017 (arXiv:1706.03762), eq. (1); grouped as in arXiv:2305.13245.
    """
    grouped = k_BTGP.shape[2] != q_BTHP.shape[2]
    mask = None if documents is None else documents.causal_mask_BTT[:, None]
    out_BHTP = F.scaled_dot_product_attention(
        q_BTHP.transpose(1, 2),
        k_BTGP.transpose(1, 2),
        v_BTGP.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=grouped,
    )
    return out_BHTP.transpose(1, 2)
