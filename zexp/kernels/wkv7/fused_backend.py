"""RWKV-7's state update by flash-linear-attention. B batch · T positions · H heads · N key width · P value width."""

from __future__ import annotations

import torch
from torch import Tensor

from zexp.kernels.documents import Documents
from zexp.kernels.fused import Fused, not_sixteen_bit, one_row
from zexp.kernels.wkv7.torch_backend import FASTEST

WIDEST = 256
CHUNK = 64  # as in the package's own RWKV-7, which a decay of FASTEST at most allows


def flash_linear_attention() -> dict[str, Fused]:
    """chunk_rwkv7. It removes S b a^T with a = -kappa and b = a kappa (its names on the left)."""
    from fla.ops.rwkv7 import chunk_rwkv7

    def run(
        r_BTHN: Tensor,
        w_BTHN: Tensor,
        k_BTHN: Tensor,
        v_BTHP: Tensor,
        kappa_BTHN: Tensor,
        a_BTHN: Tensor,
        *,
        documents: Documents | None = None,
    ) -> Tensor:
        dtype = v_BTHP.dtype
        with torch.autocast(v_BTHP.device.type, enabled=False):
            rows = [tensor.to(dtype) for tensor in (r_BTHN, k_BTHN, v_BTHP, -kappa_BTHN, kappa_BTHN * a_BTHN)]
            (r, k, v, a, b, w), ends = one_row(documents, *rows, w_BTHN.float())
            y, _ = chunk_rwkv7(
                r=r, w=w, k=k, v=v, a=a, b=b, scale=1.0, cu_seqlens=ends, safe_gate=True, lower_bound=-FASTEST, chunk_size=CHUNK
            )
        out: Tensor = y.view(v_BTHP.shape)
        return out

    return {"wkv7": Fused(run, refuses)}


def refuses(
    r_BTHN: Tensor,
    w_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHP: Tensor,
    kappa_BTHN: Tensor,
    a_BTHN: Tensor,
    *,
    documents: Documents | None = None,
) -> str | None:
    """What the kernel cannot take."""
    if max(k_BTHN.shape[3], v_BTHP.shape[3]) > WIDEST:
        return f"heads of {max(k_BTHN.shape[3], v_BTHP.shape[3])} channels, the kernel takes {WIDEST} at most"
    return not_sixteen_bit(v_BTHP)
