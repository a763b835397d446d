"""State-space duality by mamba-ssm's Triton kernels.

B batch · T positions · H heads · P head width · G groups · N state size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zexp.kernels.documents import Documents
from zexp.kernels.fused import OFFSETS, Fused, extent, not_sixteen_bit, without_init

CHUNK = 256  # the published models'; a block's own chunk is chosen for the torch backend, and changes last bits only


def mamba_ssm() -> dict[str, Fused]:
    """mamba_chunk_scan_combined (Dao & Gu 2024, arXiv:2405.21060)."""
    without_init("mamba_ssm", "selective_scan_cuda")
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def run(
        x_BTHP: Tensor,
        dt_BTH: Tensor,
        a_H: Tensor,
        b_BTGN: Tensor,
        c_BTGN: Tensor,
        d_H: Tensor,
        *,
        chunk: int,
        documents: Documents | None = None,
    ) -> Tensor:
        with torch.autocast(x_BTHP.device.type, enabled=False):
            y_BTHP: Tensor = mamba_chunk_scan_combined(
                x_BTHP,
                dt_BTH.float(),
                a_H.float(),
                b_BTGN,
                c_BTGN,
                CHUNK,
                D=d_H.float(),
                seq_idx=None if documents is None else documents.positions(),
            )
        return y_BTHP

    return {"ssd": Fused(run, refuses)}


def refuses(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    d_H: Tensor,
    *,
    chunk: int,
    documents: Documents | None = None,
) -> str | None:
    """What the kernels cannot take; state-spaces/mamba#1015: their offsets are of 32 bits."""
    batch, length, heads, width = x_BTHP.shape
    chunks = -(-length // CHUNK)
    inside = batch * chunks * max(heads * width * b_BTGN.shape[3], b_BTGN.shape[2] * CHUNK * CHUNK)  # states, B·C^T
    largest = max(inside, *(extent(tensor) for tensor in (x_BTHP, dt_BTH, b_BTGN, c_BTGN)))
    if largest >= OFFSETS:
        return f"an array of {largest} elements, beyond the kernel's offsets (state-spaces/mamba#1015)"
    return not_sixteen_bit(x_BTHP, b_BTGN, c_BTGN)
