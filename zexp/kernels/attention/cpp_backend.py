"""Causal attention on a CPU in tiles, as tiles.py: the products by torch.bmm, all between them by kernel.cpp.

B batch · T positions · H query heads · G key-value heads · J query heads of one (H / G) · P head width · W rows of a tile
N pairs of a sequence and a key-value head · L keys that a tile sees · n pairs of a tile.

A tile is W queries of some pairs against all the keys that they see. Its queries, keys and values are copied from where they lie
into arrays that stay in the cache, with which torch.bmm reaches its best rate; one pass makes probabilities of the scores, in
their place, and one pass of the backward pass the probabilities again and the gradients of the scores. Kept are q, k and v, and
two numbers a query: its largest score, and the sum of its exponentials. Forward and backward of 8 sequences of 512 with 4 heads
of 64 take 43 ms a thread in bf16, of which 28 are the products, and 76 in fp32, of which 58 (AVX-512 with bf16).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zexp.kernels.cpp.library import call, library, not_taken, product_dtype
from zexp.kernels.documents import Documents
from zexp.kernels.fused import Fused

ROWS = 128  # W: fewer are more calls, more are more scores above the diagonal
TILE_BYTES = 1 << 21  # of a tile's scores


def cpp() -> dict[str, Fused]:
    library("attention")
    return {"attention": Fused(attention, refuses)}


def attention(
    q_BTHP: Tensor, k_BTGP: Tensor, v_BTGP: Tensor, *, scale: float, window: int | None = None, documents: Documents | None = None
) -> Tensor:
    """As the torch backend's, of as many queries as keys; under autocast in its dtype."""
    q_BTHP, k_BTGP, v_BTGP = (tensor.to(product_dtype(tensor)) for tensor in (q_BTHP, k_BTGP, v_BTGP))
    with torch.autocast("cpu", enabled=False):
        return _Attention.apply(q_BTHP, k_BTGP, v_BTGP, float(scale), window, documents)


def refuses(
    q_BTHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, *, scale: float, window: int | None = None, documents: Documents | None = None
) -> str | None:
    if not 1 < q_BTHP.shape[1] == k_BSGP.shape[1]:
        return "other numbers of queries than of keys, or single ones"
    return not_taken(activations=[x.new_empty(0, dtype=product_dtype(x)) for x in (q_BTHP, k_BSGP, v_BSGP)])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTHP: Tensor, k_BTGP: Tensor, v_BTGP: Tensor, scale: float, window: int | None, documents: Documents | None
    ) -> Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BTHP, k_BTGP, v_BTGP))
        tiles = _Tiles(q, k, v, scale, window, documents)
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        kept = torch.empty(*q.shape[:3], 2, dtype=torch.float32)
        for tile in tiles:
            p = tile.scores()
            tile.softmax(p, kept)
            tile.put(torch.bmm(p, tile.keys(v), out=tiles.room("out", tile.pairs, tile.queries, v.shape[-1])), out)
        ctx.save_for_backward(q, k, v, kept)
        ctx.scale, ctx.window, ctx.documents = scale, window, documents
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, kept = ctx.saved_tensors
        dout = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        tiles = _Tiles(q, k, v, ctx.scale, ctx.window, ctx.documents)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        for tile in tiles:
            width, values = q.shape[-1], v.shape[-1]
            p, dout_tile = tile.scores(), tile.rows(dout, "dout")
            ds = torch.bmm(dout_tile, tile.keys(v).mT, out=tiles.room("ds", *p.shape))
            tile.softmax_backward(p, ds, kept)
            tile.add(torch.bmm(p.mT, dout_tile, out=tiles.room("dv", tile.pairs, tile.seen, values)), "sum of dv", dv)
            tile.add(torch.bmm(ds.mT, tile.q, out=tiles.room("dk", tile.pairs, tile.seen, width)), "sum of dk", dk)
            tile.put(torch.bmm(ds, tile.k, out=tiles.room("out", tile.pairs, tile.queries, width)), dq)
        return dq, dk, dv, None, None, None


class _Span(NamedTuple):
    """Neighbours: of pairs, queries or keys."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class _Tile:
    """Queries `_rows` of the pairs `_pairs` against the keys `_keys`."""

    def __init__(self, of: _Tiles, pairs: _Span, rows: _Span, keys: _Span):
        self._of, self._pairs, self._rows, self._keys = of, pairs, rows, keys
        self.pairs, self.queries, self.seen = pairs.size, of.heads * rows.size, keys.size
        self.q, self.k = self.rows(of.q, "q"), self.keys(of.k, "k")

    def rows(self, x_BTHP: Tensor, name: str) -> Tensor:
        """The tile's rows of x: (n, J·W, P)."""
        return self._gathered(x_BTHP, self._of.heads, self._rows, name)

    def keys(self, x_BTGP: Tensor, name: str = "v") -> Tensor:
        """The tile's keys, or their values: (n, L, P)."""
        return self._gathered(x_BTGP, 1, self._keys, name)

    def put(self, rows: Tensor, x_BTHP: Tensor) -> None:
        """Writes (n, J·W, P) where they belong."""
        call("attention", "scatter", x_BTHP.dtype, rows, x_BTHP, *self._part(x_BTHP, self._of.heads, self._rows))

    def add(self, product: Tensor, name: str, x_BTGP: Tensor) -> None:
        """Adds (n, L, P) to the sum over the tiles of these pairs, in fp32 as a product of all at once would be, and writes the
        sum into x with the last of them."""
        of, width, all_keys = self._of, x_BTGP.shape[-1], _Span(0, self._of.length)
        sums = of.room(name, self.pairs, of.length, width, dtype=torch.float32)
        if self._rows.start == 0:
            sums.zero_()
        call("attention", "add", product.dtype, product, sums, self.pairs, of.length, width, self._keys.start, self.seen)
        if self._rows.stop == of.length:
            call("attention", "scatter_sum", x_BTGP.dtype, sums, x_BTGP, *self._part(x_BTGP, 1, all_keys))

    def scores(self) -> Tensor:
        """(n, J·W, L), neither scaled nor masked."""
        return torch.bmm(self.q, self.k.mT, out=self._of.room("scores", self.pairs, self.queries, self.seen))

    def softmax(self, scores: Tensor, kept: Tensor) -> None:
        call("attention", "softmax", scores.dtype, scores, self._of.firsts, kept, *self._sizes())

    def softmax_backward(self, scores: Tensor, grads: Tensor, kept: Tensor) -> None:
        call("attention", "softmax_backward", scores.dtype, scores, grads, self._of.firsts, kept, *self._sizes())

    def _gathered(self, x: Tensor, heads: int, span: _Span, name: str) -> Tensor:
        tile = self._of.room(name, self.pairs, heads * span.size, x.shape[-1])
        call("attention", "gather", x.dtype, x, tile, *self._part(x, heads, span))
        return tile

    def _part(self, x: Tensor, heads: int, span: _Span) -> tuple[int, ...]:
        own = (self._of.groups, heads, x.shape[-1], self._pairs.start, self.pairs, span.start, span.size)
        return (*own, *x.stride()[:3])

    def _sizes(self) -> tuple[int | float, ...]:
        of, rows, keys = self._of, self._rows, self._keys
        own = (of.groups, of.heads, of.length, self._pairs.start, self.pairs, rows.start, rows.size, keys.start, keys.size)
        return (*own, of.window or 0, of.scale)


class _Tiles:
    """All tiles of a call, those of the same pairs after each other, and the arrays that they take turns in."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, documents: Documents | None):
        self.q, self.k, self.scale, self.window = q, k, scale, window
        self.length, self.groups = q.shape[1], k.shape[2]
        self.heads = q.shape[2] // self.groups
        self.firsts = None if documents is None else documents.firsts()
        self._all = q.shape[0] * self.groups
        bytes_of_a_pair = self.heads * min(ROWS, self.length) * self.length * q.element_size()
        self._together = max(1, min(self._all, TILE_BYTES // bytes_of_a_pair))
        self._rooms: dict[str, Tensor] = {}

    def room(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An array of that shape, the beginning of the one that all tiles get by that name."""
        count = shape[0] * shape[1] * shape[2]
        own = self._rooms.get(name)
        if own is None or own.numel() < count:
            own = self._rooms[name] = torch.empty(count, dtype=dtype or self.q.dtype)
        return own[:count].view(shape)

    def __iter__(self) -> Iterator[_Tile]:
        for first in range(0, self._all, self._together):
            pairs = _Span(first, min(first + self._together, self._all))
            for start in range(0, self.length, ROWS):
                rows = _Span(start, min(start + ROWS, self.length))
                yield _Tile(self, pairs, rows, _Span(self._first_key(pairs, start), rows.stop))

    def _first_key(self, pairs: _Span, row: int) -> int:
        """The first key that some of the pairs sees from the row on."""
        earliest = 0 if self.window is None else max(0, row - self.window + 1)
        if self.firsts is None:
            return earliest
        own = self.firsts[pairs.start // self.groups : (pairs.stop - 1) // self.groups + 1, row]
        return max(earliest, int(own.min()))
