"""Causal attention on a CPU in tiles of the score matrix, with a hand-written gradient.

B batch · T positions · H query heads · G key-value heads · J query heads of one (H / G) · P head width · W rows of a tile
N pairs of a sequence and a key-value head · L keys that a tile sees.

torch's own CPU kernel multiplies in small blocks: forward and backward of 8 sequences of 512 with 4 heads of 64 take it 97 ms a
thread in bf16 and 101 in fp32, these tiles 63 and 88 (torch 2.13, AVX-512 with bf16). A tile is W queries of some heads against all the keys that they
see, so that it stays in the cache and nothing is computed above the diagonal but in its last W columns. Nothing of a tile is
kept: the backward pass makes the scores again (softmax is cheaper than one of its four products).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zexp.kernels.documents import Documents
from zexp.kernels.precision import at_least_fp32

ROWS = 128  # W: fewer are more calls, more are more scores above the diagonal
TILE_ELEMENTS = 1 << 19  # scores of a tile: 2 MB in fp32


def attention_in_tiles(
    q_BTHP: Tensor,
    k_BTGP: Tensor,
    v_BTGP: Tensor,
    scale: float,
    window: int | None,
    documents: Documents | None,
) -> Tensor:
    """attention() of as many queries as keys. Under autocast in its dtype, as torch's own would be."""
    device = q_BTHP.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q_BTHP, k_BTGP, v_BTGP = (tensor.to(dtype) for tensor in (q_BTHP, k_BTGP, v_BTGP))
    with torch.autocast(device, enabled=False):
        return _Tiled.apply(q_BTHP, k_BTGP, v_BTGP, scale, window, documents)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTHP: Tensor, k_BTGP: Tensor, v_BTGP: Tensor, scale: float, window: int | None, documents: Documents | None
    ) -> Tensor:
        ctx.save_for_backward(q_BTHP, k_BTGP, v_BTGP)
        ctx.scale, ctx.window, ctx.documents = scale, window, documents
        tiles = _Tiles(q_BTHP, k_BTGP, scale, window, documents)
        v_NTP = _keys_first(v_BTGP)
        out_NJTP = tiles.q_NJTP.new_empty((*tiles.q_NJTP.shape[:3], v_BTGP.shape[-1]))
        for tile in tiles:
            p = tile.probabilities().to(v_NTP.dtype)
            out_NJTP[tile.pairs, :, tile.rows] = torch.bmm(p, v_NTP[tile.pairs, tile.keys]).unflatten(1, tile.heads)
        return _heads_last(out_NJTP, q_BTHP.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q_BTHP, k_BTGP, v_BTGP = ctx.saved_tensors
        batch = q_BTHP.shape[0]
        tiles = _Tiles(q_BTHP, k_BTGP, ctx.scale, ctx.window, ctx.documents)
        k_NTP, v_NTP = tiles.k_NTP, _keys_first(v_BTGP)
        dout_NJTP = _queries_first(grads[0], k_BTGP.shape[2]).contiguous()
        dq_NJTP = torch.empty_like(tiles.q_NJTP)
        # Added to by every tile: in fp32, as a product of all tiles at once would be.
        dk_NTP = torch.zeros_like(k_NTP, dtype=tiles.sums)
        dv_NTP = torch.zeros_like(v_NTP, dtype=tiles.sums)
        for tile in tiles:
            p = tile.probabilities()
            dout = dout_NJTP[tile.pairs, :, tile.rows].flatten(1, 2)
            dp = torch.bmm(dout, v_NTP[tile.pairs, tile.keys].mT).to(tiles.sums)
            dv_NTP[tile.pairs, tile.keys] += torch.bmm(p.to(dout.dtype).mT, dout)
            ds = torch._softmax_backward_data(dp, p, -1, tiles.sums).to(dout.dtype)
            dq_NJTP[tile.pairs, :, tile.rows] = torch.bmm(ds, k_NTP[tile.pairs, tile.keys]).unflatten(1, tile.heads)
            dk_NTP[tile.pairs, tile.keys] += torch.bmm(ds.mT, tile.q)  # q has the scale
        return (
            _heads_last(dq_NJTP.mul_(ctx.scale), batch),
            _heads_last(dk_NTP[:, None].to(k_BTGP.dtype), batch),
            _heads_last(dv_NTP[:, None].to(v_BTGP.dtype), batch),
            None,
            None,
            None,
        )


class _Tile:
    """Queries `rows` of the pairs `pairs` against the keys `keys`."""

    def __init__(self, of: _Tiles, pairs: slice, rows: slice, keys: slice):
        self._of, self.pairs, self.rows, self.keys = of, pairs, rows, keys
        self.q = of.q_NJTP[pairs, :, rows].flatten(1, 2)  # (n, J·W, P)
        self.heads = (of.q_NJTP.shape[1], rows.stop - rows.start)

    def probabilities(self) -> Tensor:
        """(n, J·W, L) in fp32 at least, in a buffer that the next call fills again."""
        of = self._of
        scores = torch.bmm(self.q, of.k_NTP[self.pairs, self.keys].mT)
        room, out = (buffer[: scores.numel()].view(scores.shape) for buffer in of.buffers)
        room.copy_(scores)
        unmasked = room.unflatten(1, self.heads)
        rows, columns = self.rows.stop - self.rows.start, self.keys.stop - self.keys.start
        if of.window is None:
            unmasked[..., -rows:] += of.unseen(rows, rows)
        else:
            unmasked += of.unseen(rows, columns)
        if of.documents is not None:
            ids_NT = of.documents
            other = ids_NT[self.pairs, self.rows, None] != ids_NT[self.pairs, None, self.keys]
            unmasked.masked_fill_(other[:, None], float("-inf"))
        return torch.softmax(room, -1, out=out)


class _Tiles:
    """All tiles of a call, and what they read."""

    def __init__(self, q_BTHP: Tensor, k_BTGP: Tensor, scale: float, window: int | None, documents: Documents | None):
        groups = k_BTGP.shape[2]
        self.q_NJTP = _queries_first(q_BTHP, groups).mul(scale)
        self.k_NTP = _keys_first(k_BTGP)
        self.sums = at_least_fp32(q_BTHP.new_empty(0)).dtype
        self.window = window
        self.documents = None if documents is None else documents.ids_BT.repeat_interleave(groups, dim=0)
        pairs, heads, length = self.q_NJTP.shape[:3]
        self._pairs, self._length = pairs, length
        rows = min(ROWS, length)
        self._together = max(1, min(pairs, TILE_ELEMENTS // (heads * rows * length)))
        room = self._together * heads * rows * length
        self.buffers = [q_BTHP.new_empty(room, dtype=self.sums) for _ in range(2)]
        self._unseen: dict[tuple[int, int], Tensor] = {}

    def unseen(self, rows: int, columns: int) -> Tensor:
        """(W, L): -inf where a query does not see a key, 0 elsewhere; the last query is at the last key."""
        if (rows, columns) not in self._unseen:
            position = torch.arange(columns - rows, columns, device=self.k_NTP.device)[:, None]
            key = torch.arange(columns, device=self.k_NTP.device)
            hidden = key > position
            if self.window is not None:
                hidden |= position - key >= self.window
            self._unseen[rows, columns] = self.k_NTP.new_zeros(rows, columns, dtype=self.sums).masked_fill_(hidden, float("-inf"))
        return self._unseen[rows, columns]

    def __iter__(self) -> Iterator[_Tile]:
        for first in range(0, self._pairs, self._together):
            pairs = slice(first, min(first + self._together, self._pairs))
            for start in range(0, self._length, ROWS):
                rows = slice(start, min(start + ROWS, self._length))
                keys = slice(0 if self.window is None else max(0, start - self.window + 1), rows.stop)
                yield _Tile(self, pairs, rows, keys)


def _queries_first(x_BTHP: Tensor, groups: int) -> Tensor:
    """(N, J, T, P)."""
    return x_BTHP.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)


def _keys_first(x_BTGP: Tensor) -> Tensor:
    """A contiguous (N, T, P)."""
    return x_BTGP.transpose(1, 2).flatten(0, 1).contiguous()


def _heads_last(x_NJTP: Tensor, batch: int) -> Tensor:
    """(B, T, H, P)."""
    return x_NJTP.unflatten(0, (batch, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
