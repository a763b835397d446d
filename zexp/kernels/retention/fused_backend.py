"""Retention by flash-linear-attention: gated linear attention whose gates are constants.

B batch · T positions · H heads · N key width · P value width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from zexp.kernels.documents import Documents
from zexp.kernels.fused import Fused, not_sixteen_bit, one_row


def flash_linear_attention() -> dict[str, Fused]:
    """chunk_simple_gla with decays of its own choice: chunk_retention has RetNet's built in."""
    from fla.ops.simple_gla import chunk_simple_gla

    def run(
        q_BTHN: Tensor,
        k_BTHN: Tensor,
        v_BTHP: Tensor,
        log_decays: tuple[float, ...],
        *,
        scale: float,
        chunk: int,
        documents: Documents | None = None,
    ) -> Tensor:
        with torch.autocast(v_BTHP.device.type, enabled=False):
            (q, k, v), ends = one_row(documents, q_BTHN.to(v_BTHP.dtype), k_BTHN.to(v_BTHP.dtype), v_BTHP)
            y, _ = chunk_simple_gla(q, k, v, g_gamma=_decays(log_decays, v.device), scale=scale, cu_seqlens=ends)
        out: Tensor = y.view(v_BTHP.shape)
        return out

    return {"retention": Fused(run, refuses)}


def refuses(
    q_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHP: Tensor,
    log_decays: tuple[float, ...],
    *,
    scale: float,
    chunk: int,
    documents: Documents | None = None,
) -> str | None:
    """What the kernel cannot take."""
    return not_sixteen_bit(v_BTHP)


@lru_cache(maxsize=32)
def _decays(log_decays: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # evaluation may be what makes it, and training what keeps it for a backward pass
        return torch.tensor(log_decays, dtype=torch.float32, device=device)
