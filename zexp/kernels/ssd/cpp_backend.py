"""State-space duality in chunks: matrix products by torch, in the inputs' dtype, and kernel.cpp around them.

B batch · T positions · H heads · P head width · G groups · N state size · Q chunk · M chunks of all rows (padded) · J heads of a
group (H / G).

The scheme is the torch backend's (Mamba-2, arXiv:2405.21060, section 6): attention with a decay within a chunk, a state between
chunks. What goes into a product is rounded to the inputs' dtype once (x dt, weights, the states that enter the chunks); running
sums, decays, carried states and all sums outside the products are fp32. Kept for the backward pass besides the inputs are the
states that enter the chunks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zexp.kernels.cpp.library import call, library, not_taken
from zexp.kernels.documents import Documents
from zexp.kernels.fused import Fused

BUFFER_ELEMENTS = 1 << 19  # of the Q × Q arrays of the chunks that are at hand at a time: 1 MB in bf16


def cpp() -> dict[str, Fused]:
    library("ssd")
    return {"ssd": Fused(ssd, refuses)}


def ssd(
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
    """As the torch backend's; in bf16 what goes into the products is rounded to it."""
    with torch.autocast("cpu", enabled=False):  # the backward pass knows none: dtypes would not fit together
        return _Ssd.apply(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, d_H, min(chunk, x_BTHP.shape[1]), documents)


@torch.no_grad()
def ssd_continue(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    d_H: Tensor,
    state_BGNJ: Tensor,
    *,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """As the torch backend's, of inputs that `refuses` lets pass and a state in fp32."""
    inputs = _inputs(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, d_H)
    last_BGNJ = torch.empty(state_BGNJ.shape, dtype=torch.float32)
    with torch.autocast("cpu", enabled=False):
        y_BTHP, _ = _scan(inputs, min(chunk, x_BTHP.shape[1]), None, state_BGNJ.contiguous(), last_BGNJ)
    return y_BTHP, last_BGNJ


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
    return not_taken(activations=(x_BTHP, b_BTGN, c_BTGN), whole=(dt_BTH, a_H, d_H))


class _Inputs(NamedTuple):
    x_BTHP: Tensor
    dt_BTH: Tensor
    a_H: Tensor
    b_BTGN: Tensor
    c_BTGN: Tensor
    d_H: Tensor


class _Chunks:
    """The chunks of a call, and the arrays that both passes make of the inputs."""

    def __init__(self, inputs: _Inputs, chunk: int, ids_BT: Tensor | None, dy_BTHP: Tensor | None = None):
        x, dt, a, b, c, _ = inputs
        batch, length, heads, width = x.shape
        groups, state = b.shape[2:]
        self.dtype, self.chunk, self.heads = x.dtype, chunk, heads
        self.count = batch * -(-length // chunk)
        strides = (stride for tensor in (x, b, c) for stride in tensor.stride()[:2])
        self.sizes = torch.tensor((batch, length, chunk, heads, width, groups, state, *strides))
        inner = width * heads // groups
        self.sums_MHQ, self.carry_MH = self.new(heads, chunk, dtype=torch.float32), self.new(heads, dtype=torch.float32)
        self.written_MHQP, self.reaching_MGQJ = self.new(heads, chunk, width), self.new(groups, chunk, inner)
        self.b_MGQN, self.c_MGQN = (self.new(groups, chunk, state) for _ in range(2))
        backward = dy_BTHP is not None
        self.dy_MHQP = self.new(heads, chunk, width) if backward else None
        self.dread_MGQJ = self.new(groups, chunk, inner) if backward else None
        self.call(
            "enter", x, dt, a, b, c, ids_BT, dy_BTHP, self.sums_MHQ, self.written_MHQP, self.reaching_MGQJ, self.b_MGQN, self.c_MGQN,
            self.dy_MHQP, self.dread_MGQJ, self.carry_MH,
        )  # fmt: skip

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.count, *shape, dtype=dtype or self.dtype)

    def call(self, function: str, *args: Tensor | int | None) -> None:
        call("ssd", function, self.dtype, self.sizes, *args)

    def scores(self) -> Tensor:
        """(M, G, Q, Q): C B^T, the half above the diagonal too."""
        return _product(self.c_MGQN, self.b_MGQN.mT)

    def parts(self) -> list[tuple[int, int]]:
        """The first chunk of those that are at hand at a time, and how many they are."""
        together = max(1, min(self.count, BUFFER_ELEMENTS // (self.heads * self.chunk**2)))
        return [(first, min(together, self.count - first)) for first in range(0, self.count, together)]


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTHP: Tensor,
        dt_BTH: Tensor,
        a_H: Tensor,
        b_BTGN: Tensor,
        c_BTGN: Tensor,
        d_H: Tensor,
        chunk: int,
        documents: Documents | None,
    ) -> Tensor:
        inputs = _inputs(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, d_H)
        ids = None if documents is None else documents.ids_int64()
        y_BTHP, entering = _scan(inputs, chunk, ids)
        ctx.save_for_backward(*inputs, entering)
        ctx.chunk, ctx.ids = chunk, ids
        return y_BTHP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *saved, entering = ctx.saved_tensors
        inputs, ids, chunk, dy = _Inputs(*saved), ctx.ids, ctx.chunk, grads[0].contiguous()
        x, dt, a, b, c, d = inputs
        at = _Chunks(inputs, chunk, ids, dy)
        assert at.dread_MGQJ is not None and at.dy_MHQP is not None
        read, scores = _product(at.c_MGQN, entering), at.scores()
        dc, dentering = _product(at.dread_MGQJ, entering.mT), _product(at.c_MGQN.mT, at.dread_MGQJ)
        dleaving, dcarried = torch.empty_like(entering), at.new(at.heads, b.shape[3], dtype=torch.float32)
        at.call("carry_backward", dentering, entering, at.carry_MH, dleaving, dcarried)
        dreaching, db = _product(at.b_MGQN, dleaving), _product(at.reaching_MGQJ, dleaving.mT)
        del dentering, dleaving, entering

        dscores, dsums = torch.empty_like(scores), torch.empty_like(at.sums_MHQ)
        dx, ddt = torch.empty(x.shape, dtype=x.dtype), torch.empty_like(dt)
        da, dd = torch.empty_like(at.carry_MH), torch.empty_like(at.carry_MH)
        for first, count in at.parts():
            part = slice(first, first + count)
            square = _product(at.dy_MHQP[part], at.written_MHQP[part].mT)
            weights = torch.empty_like(square)
            at.call("weigh_backward", at.sums_MHQ, ids, scores, square, weights, dscores, dsums, first, count)
            dinside = _product(weights.mT, at.dy_MHQP[part])
            at.call(
                "leave_backward", x, dt, a, d, at.sums_MHQ, ids, dy, read, at.dread_MGQJ, dreaching, dinside, dsums, dcarried, dx, ddt,
                da, dd, first, count,
            )  # fmt: skip
        db_BTGN, dc_BTGN = (torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (b, c))
        at.call("unpack", db, _product(dscores.mT, at.c_MGQN), db_BTGN)
        at.call("unpack", dc, _product(dscores, at.b_MGQN), dc_BTGN)
        return dx, ddt, da.sum(0), db_BTGN, dc_BTGN, dd.sum(0), None, None


def _inputs(x_BTHP: Tensor, dt_BTH: Tensor, a_H: Tensor, b_BTGN: Tensor, c_BTGN: Tensor, d_H: Tensor) -> _Inputs:
    b, c = _side_by_side(b_BTGN), _side_by_side(c_BTGN)
    return _Inputs(_side_by_side(x_BTHP), dt_BTH.contiguous(), a_H.contiguous(), b, c, d_H.contiguous())


def _scan(
    inputs: _Inputs, chunk: int, ids: Tensor | None, initial: Tensor | None = None, last: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y, and the states that enter the chunks. initial: the one before the first position, None = zeros; last: gets the one after."""
    at = _Chunks(inputs, chunk, ids)
    leaving = _product(at.b_MGQN.mT, at.reaching_MGQJ)
    entering = torch.empty_like(leaving)
    at.call("carry", leaving, at.carry_MH, initial, entering, last)
    del leaving
    read, scores = _product(at.c_MGQN, entering), at.scores()
    y_BTHP = torch.empty(inputs.x_BTHP.shape, dtype=at.dtype)
    for first, count in at.parts():
        weights = torch.empty(count, at.heads, chunk, chunk, dtype=at.dtype)
        at.call("weigh", at.sums_MHQ, ids, scores, weights, first, count)
        inside = _product(weights, at.written_MHQP[first : first + count])
        at.call("leave", inputs.x_BTHP, inputs.d_H, at.sums_MHQ, ids, read, inside, y_BTHP, first, count)
    return y_BTHP, entering


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Of the last two dimensions of (M, G or H, …)."""
    made = torch.bmm(left.flatten(0, 1), right.flatten(0, 1))
    return made.unflatten(0, left.shape[:2])


def _side_by_side(x_BTHP: Tensor) -> Tensor:
    """Itself, or a copy, with a position's numbers side by side."""
    return x_BTHP if x_BTHP.stride(3) == 1 and x_BTHP.stride(2) == x_BTHP.shape[3] else x_BTHP.contiguous()
