"""Rows in chunks: how they are cut, and what document boundaries switch off where a state is carried between chunks.

B batch · T positions · H heads · P width of a head · Q positions of a chunk · C chunks of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zexp.kernels.documents import Documents
from zexp.kernels.precision import at_least_fp32


def parts(length: int, chunk: int) -> list[slice]:
    """The positions of each chunk; the last may be shorter."""
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def heads(tensor_BTHP: Tensor, at: slice) -> Tensor:
    """(B, H, Q, P), contiguous, in fp32 at least, of the positions `at`: a copy, or a view where that is so already."""
    return at_least_fp32(tensor_BTHP[:, at]).transpose(1, 2).contiguous()


class ChunkMasks(NamedTuple):
    """Each is 0 or 1. All layers share them, so they are never written into."""

    pair_BCQQ: Tensor  # i reads j within the chunk: j <= i, in one document
    entry_BCQ: Tensor  # i reads the state that enters the chunk
    exit_BCQ: Tensor  # j writes into the state that leaves the chunk
    carry_BC: Tensor  # the entering state reaches the leaving one


class OneChunkMasks(NamedTuple):
    """The same of one chunk, with a dimension of 1 for the heads."""

    pair_B1QQ: Tensor
    entry_B1Q1: Tensor
    exit_B1Q1: Tensor
    carry_B111: Tensor


def chunk_masks(documents: Documents, chunk: int, dtype: torch.dtype) -> ChunkMasks:
    """The masks of rows that are padded to whole chunks, made once a batch. The first chunk of a row is entered by a
    zero state, which nothing is cut from. Padding belongs to the last document.
    """
    return documents.once(("chunk_masks", chunk, dtype), lambda: _chunk_masks(documents, chunk, dtype))


def masks_of_each_chunk(documents: Documents, chunk: int, dtype: torch.dtype) -> list[OneChunkMasks]:
    """Views of chunk_masks, without the padding: the last may have fewer positions than `chunk`. Made once a batch."""
    return documents.once(("each_chunk", chunk, dtype), lambda: _masks_of_each_chunk(documents, chunk, dtype))


def _chunk_masks(documents: Documents, chunk: int, dtype: torch.dtype) -> ChunkMasks:
    ids_BCQ = documents.padded(chunk).unflatten(1, (-1, chunk))
    last_BC = ids_BCQ[:, :, -1]
    before_BC = torch.cat((ids_BCQ[:, :1, 0], last_BC[:, :-1]), dim=1)
    return ChunkMasks(
        pair_BCQQ=(ids_BCQ[..., :, None] == ids_BCQ[..., None, :]).tril().to(dtype),
        entry_BCQ=(ids_BCQ == before_BC[..., None]).to(dtype),
        exit_BCQ=(ids_BCQ == last_BC[..., None]).to(dtype),
        carry_BC=(last_BC == before_BC).to(dtype),
    )


def _masks_of_each_chunk(documents: Documents, chunk: int, dtype: torch.dtype) -> list[OneChunkMasks]:
    length = documents.ids_BT.shape[1]
    pair, entry, exits, carry = chunk_masks(documents, min(chunk, length), dtype)
    each = []
    for number, at in enumerate(parts(length, chunk)):
        size = at.stop - at.start
        each.append(
            OneChunkMasks(
                pair[:, None, number, :size, :size],
                entry[:, None, number, :size, None],
                exits[:, None, number, :size, None],
                carry[:, None, number, None, None],
            )
        )
    return each
