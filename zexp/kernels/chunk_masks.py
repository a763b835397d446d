"""What document boundaries switch off in an operation that goes through a row in chunks and carries a state.

B batch · T positions · Q positions of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ChunkMasks(NamedTuple):
    """Each is 0 or 1, with a dimension of 1 for the heads."""

    pair_B1QQ: Tensor  # i reads j within the chunk
    entry_B1Q1: Tensor  # i reads the state that enters the chunk
    exit_B1Q1: Tensor  # j writes into the state that leaves the chunk
    carry_B111: Tensor  # the entering state reaches the leaving one


def chunk_masks(ids_BT: Tensor, chunk: slice, dtype: torch.dtype) -> ChunkMasks:
    """The masks of the positions `chunk`; the first chunk of a row is entered by a zero state, which nothing is cut from."""
    ids_BQ = ids_BT[:, chunk]
    last_B1 = ids_BQ[:, -1:]
    before_B1 = ids_BT[:, max(chunk.start - 1, 0), None]
    return ChunkMasks(
        pair_B1QQ=(ids_BQ[:, None, :, None] == ids_BQ[:, None, None, :]).to(dtype),
        entry_B1Q1=(ids_BQ == before_B1)[:, None, :, None].to(dtype),
        exit_B1Q1=(ids_BQ == last_B1)[:, None, :, None].to(dtype),
        carry_B111=(last_B1 == before_B1)[:, None, :, None].to(dtype),
    )
