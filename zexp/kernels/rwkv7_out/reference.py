"""RWKV-7's output, written as its formula. B batch · T positions · H heads · N width of a head."""

from __future__ import annotations

from torch import Tensor


def rwkv7_out(
    y_BTHN: Tensor,
    r_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHN: Tensor,
    g_BTHN: Tensor,
    r_k_HN: Tensor,
    weight_HN: Tensor,
    bias_HN: Tensor,
    eps: float,
) -> Tensor:
    """(norm(y) * weight + bias + (sum of r * r_k * k) v) * g, the norm being a LayerNorm of each head.

    Source: RWKV-7 (arXiv:2503.14456), section 4.1 (the bonus u_t and the output).
    """
    centred = y_BTHN - y_BTHN.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    bonus = (r_BTHN * r_k_HN * k_BTHN).sum(-1, keepdim=True) * v_BTHN
    return (normed * weight_HN + bias_HN + bonus) * g_BTHN
