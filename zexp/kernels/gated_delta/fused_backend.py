"""The gated delta rule by flash-linear-attention.

B batch · T positions · G key heads · N key width · H value heads · P value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zexp.kernels.documents import Documents
from zexp.kernels.fused import Fused, not_sixteen_bit, one_row

WIDEST = 256


def flash_linear_attention() -> dict[str, Fused]:
    """chunk_gated_delta_rule. It divides q and k by their length itself, and scales by 1 / sqrt(N), as the operation does."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def run(
        q_BTGN: Tensor,
        k_BTGN: Tensor,
        v_BTHP: Tensor,
        g_BTH: Tensor,
        beta_BTH: Tensor,
        *,
        chunk: int,
        documents: Documents | None = None,
    ) -> Tensor:
        dtype = v_BTHP.dtype
        with torch.autocast(v_BTHP.device.type, enabled=False):
            rows = (q_BTGN.to(dtype), k_BTGN.to(dtype), v_BTHP, g_BTH.float(), beta_BTH.float())
            (q, k, v, g, beta), ends = one_row(documents, *rows)
            y, _ = chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True, cu_seqlens=ends)
        out: Tensor = y.view(v_BTHP.shape)
        return out

    return {"gated_delta": Fused(run, refuses)}


def refuses(
    q_BTGN: Tensor,
    k_BTGN: Tensor,
    v_BTHP: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    chunk: int,
    documents: Documents | None = None,
) -> str | None:
    """What the kernel cannot take."""
    if k_BTGN.shape[3] > WIDEST:
        return f"keys of {k_BTGN.shape[3]} channels, the kernel takes {WIDEST} at most"
    return not_sixteen_bit(v_BTHP)
