"""The selective scan of Mamba-1 in cache-sized pieces, with a hand-written gradient.

B batch · T positions · I inner channels · H heads · P channels of a head (I / H) · N state size · M chunks of Q positions

Every channel decays at N rates of its own, so no product of matrices does the work: there are T·I·N decays, and each
takes an exponential. They exist for one chunk and some rows and channels at a time, as (Q, B, N, P) in buffers that stay
in the cache, P innermost so that B, C and dt are broadcast along whole vectors. Kept for the backward pass is the state
that enters each chunk, from which it computes the chunk's states again. Decays are at most 1: nothing overflows.

All but one operation takes a whole chunk at once. The recurrence takes one multiply-add a position, and that is the
cheapest form there is. One thread of an EPYC with AVX-512, B 8, T 512, I 512, N 16, forward pass in fp32:
    29 ms   as here: one multiply-add a position
    82 ms   all chunks at once from zero states, then their carried states with decays of their own (two exponentials
            where there was one, and the states pass through memory twice)
   103 ms   log-depth scans of chunks of 8 (6 passes over the states for one)
A multiply-add of STEP_ELEMENTS numbers takes ten times what calling it does, so the loop costs a tenth where there is
that much to do at a position. exp2 takes 0.3 ns a number where exp takes 0.85 (MKL's), so a carries a factor log2(e).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zexp.kernels.documents import Documents
from zexp.kernels.precision import at_least_fp32
from zexp.kernels.selective_scan.sizes import CHUNK

STEP_ELEMENTS = 1 << 15  # numbers of a state that are computed together on a CPU
LOG2_E = math.log2(math.e)


def selective_scan(
    x_BTI: Tensor,
    dt_BTI: Tensor,
    a_IN: Tensor,
    b_BTHN: Tensor,
    c_BTHN: Tensor,
    d_I: Tensor,
    dt_bias_I: Tensor | None = None,
    z_BTI: Tensor | None = None,
    *,
    documents: Documents | None = None,
) -> Tensor:
    """The selective state space of Mamba-1, (B, T, I), in x's dtype; arithmetic in fp32 at least.

    S_t = exp(dt_t a) S_{t-1} + dt_t x_t B_t, y_t = S_t C_t + d x_t. dt is positive, a negative. The I / H channels of a
    head share its B and C. documents: the state is zero before every document. dt_bias: dt is softplus(dt + dt_bias) instead.
    z: what is returned is y silu(z).
    """
    if dt_bias_I is not None:
        dt_BTI = torch.nn.functional.softplus(at_least_fp32(dt_BTI) + dt_bias_I)
    x, dt, a, b, c, d = (at_least_fp32(tensor) for tensor in (x_BTI, dt_BTI, a_IN, b_BTHN, c_BTHN, d_I))
    with torch.autocast(x.device.type, enabled=False):
        y = _SelectiveScan.apply(x, dt, a, b, c, d, documents).to(x_BTI.dtype)
    return y if z_BTI is None else y * torch.nn.functional.silu(z_BTI)


@torch.no_grad()
def selective_scan_continue(
    x_BTI: Tensor,
    dt_BTI: Tensor,
    a_IN: Tensor,
    b_BTHN: Tensor,
    c_BTHN: Tensor,
    d_I: Tensor,
    state_BHNP: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same from a state in fp32 at least, and the state after the last position. No gradient.

    One position takes the recurrence itself.
    """
    x, dt, a, b, c, d = (at_least_fp32(tensor) for tensor in (x_BTI, dt_BTI, a_IN, b_BTHN, c_BTHN, d_I))
    with torch.autocast(x.device.type, enabled=False):
        if x.shape[1] == 1:
            heads = state_BHNP.shape[1]
            rates_HNP = a.unflatten(0, (heads, -1)).mT * LOG2_E
            dt_BH1P, written_BH1P = (tensor.view(-1, heads, 1, state_BHNP.shape[3]) for tensor in (dt, dt * x))
            last_BHNP = torch.mul(dt_BH1P, rates_HNP).exp2_().mul_(state_BHNP)
            last_BHNP.addcmul_(written_BH1P, b[:, 0, :, :, None])
            y = torch.matmul(c[:, 0, :, None], last_BHNP).view(x.shape)
        else:
            y, _, last_BHNP = _scan(_Inputs.of(x, dt, a, b, c, None), state_BHNP)
        return y.addcmul_(x, d).to(x_BTI.dtype), last_BHNP


class _Inputs(NamedTuple):
    """Time before rows. written: dt x. decaying: dt, and beyond all measure where a document starts."""

    written_TBI: Tensor
    decaying_TBI: Tensor
    rates_HNP: Tensor
    b_TBHN: Tensor
    c_TBHN: Tensor

    @classmethod
    def of(
        cls, x_BTI: Tensor, dt_BTI: Tensor, a_IN: Tensor, b_BTHN: Tensor, c_BTHN: Tensor, documents: Documents | None
    ) -> _Inputs:
        decaying_BTI = dt_BTI
        if documents is not None:
            starts_BT = torch.nn.functional.pad(~documents.same_as_before(1), (1, 0))
            # exp2 makes 0 of what it decays by; finite, lest an underflown rate of 0 made NaN.
            decaying_BTI = dt_BTI.masked_fill(starts_BT[:, :, None], torch.finfo(dt_BTI.dtype).max)
        return cls(
            (x_BTI * dt_BTI).transpose(0, 1),
            decaying_BTI.transpose(0, 1),
            a_IN.unflatten(0, (b_BTHN.shape[2], -1)).mT.contiguous(),
            b_BTHN.transpose(0, 1).contiguous(),
            c_BTHN.transpose(0, 1).contiguous(),
        )


class _Piece(NamedTuple):
    """What is scanned at a time: rows and channels of one head, `channels` within it and `inner` among all."""

    rows: slice
    head: int
    channels: slice
    inner: slice


def _pieces(state_BHNP: Tensor) -> Iterator[_Piece]:
    batch, heads, size, width = state_BHNP.shape
    limit = STEP_ELEMENTS if state_BHNP.device.type == "cpu" else state_BHNP.numel()
    channels = min(width, max(1, limit // size))
    rows = min(batch, max(1, limit // (size * channels)))
    for row in range(0, batch, rows):
        for head in range(heads):
            for start in range(0, width, channels):
                end = min(start + channels, width)
                inner = slice(head * width + start, head * width + end)
                yield _Piece(slice(row, min(row + rows, batch)), head, slice(start, end), inner)


class _Room:
    """The arrays of one chunk of one piece, (Q, B, N, P) each, and the state at each of its positions."""

    def __init__(self, state_BNP: Tensor, arrays: int):
        self.arrays = [state_BNP.new_empty(CHUNK, *state_BNP.shape) for _ in range(arrays)]
        self.steps = [array.unbind(0) for array in self.arrays]

    def fill(self, inputs: _Inputs, piece: _Piece, times: slice, entering_BNP: Tensor) -> tuple[Tensor, Tensor]:
        """The chunk's decays and states."""
        count = times.stop - times.start
        decays, states = (array[:count] for array in self.arrays[:2])
        rates_NP = inputs.rates_HNP[piece.head, :, piece.channels] * LOG2_E
        torch.mul(inputs.decaying_TBI[times, piece.rows, None, piece.inner], rates_NP, out=decays).exp2_()
        written = inputs.written_TBI[times, piece.rows, None, piece.inner]
        torch.mul(written, inputs.b_TBHN[times, piece.rows, piece.head, :, None], out=states)
        state = entering_BNP
        for decay, written_here in zip(self.steps[0][:count], self.steps[1], strict=False):
            state = torch.addcmul(written_here, decay, state, out=written_here)
        return decays, states


def _chunks(length: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]


def _rows_of(tensor: Tensor) -> Tensor:
    """(Q, B, P) to (Q·B, 1, P)."""
    return tensor.reshape(-1, 1, tensor.shape[-1])


def _scan(inputs: _Inputs, initial_BHNP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is read, (B, T, I); the state that enters each chunk, (M, B, H, N, P); the last state."""
    length, batch, inner = inputs.written_TBI.shape
    chunks = _chunks(length)
    y_BTI = inputs.written_TBI.new_empty(batch, length, inner)
    y_TBI = y_BTI.transpose(0, 1)
    states_MBHNP = initial_BHNP.new_empty(len(chunks) + 1, *initial_BHNP.shape)
    states_MBHNP[0] = initial_BHNP
    for piece in _pieces(initial_BHNP):
        entering = states_MBHNP[:, piece.rows, piece.head, :, piece.channels]
        room = _Room(entering[0], arrays=2)
        for chunk, times in enumerate(chunks):
            _, states = room.fill(inputs, piece, times, entering[chunk])
            entering[chunk + 1] = states[-1]
            read = torch.bmm(_rows_of(inputs.c_TBHN[times, piece.rows, piece.head]), states.flatten(0, 1))
            y_TBI[times, piece.rows, piece.inner] = read.view(*states.shape[:2], -1)
    return y_BTI, states_MBHNP[:-1], states_MBHNP[-1]


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTI: Tensor,
        dt_BTI: Tensor,
        a_IN: Tensor,
        b_BTHN: Tensor,
        c_BTHN: Tensor,
        d_I: Tensor,
        documents: Documents | None,
    ) -> Tensor:
        batch, _, heads, size = b_BTHN.shape
        zero_BHNP = x_BTI.new_zeros(batch, heads, size, x_BTI.shape[2] // heads)
        y_BTI, entering_MBHNP, _ = _scan(_Inputs.of(x_BTI, dt_BTI, a_IN, b_BTHN, c_BTHN, documents), zero_BHNP)
        ctx.save_for_backward(x_BTI, dt_BTI, a_IN, b_BTHN, c_BTHN, d_I, entering_MBHNP)
        ctx.documents = documents
        return y_BTI.addcmul_(x_BTI, d_I)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTI, dt_BTI, a_IN, b_BTHN, c_BTHN, d_I, entering_MBHNP = ctx.saved_tensors
        dy_BTI = grads[0]
        inputs = _Inputs.of(x_BTI, dt_BTI, a_IN, b_BTHN, c_BTHN, ctx.documents)
        chunks = _chunks(x_BTI.shape[1])
        dy_TBI, dt_TBI = dy_BTI.transpose(0, 1), dt_BTI.transpose(0, 1)
        dwritten_BTI, dlog_BTI = torch.empty_like(dy_BTI), torch.empty_like(dy_BTI)
        dwritten_TBI, dlog_TBI = dwritten_BTI.transpose(0, 1), dlog_BTI.transpose(0, 1)
        drates_HNP = torch.zeros_like(inputs.rates_HNP)
        db_TBHN, dc_TBHN = torch.zeros_like(inputs.b_TBHN), torch.zeros_like(inputs.c_TBHN)
        for piece in _pieces(entering_MBHNP[0]):
            rows, head, inner = piece.rows, piece.head, piece.inner
            entering = entering_MBHNP[:, rows, head, :, piece.channels]
            rates_NP = inputs.rates_HNP[head, :, piece.channels]
            room = _Room(entering[0], arrays=3)
            later = torch.zeros_like(entering[0])  # what the next chunk's first state gives back to this one's last
            for chunk, times in reversed(list(enumerate(chunks))):
                decays, states = room.fill(inputs, piece, times, entering[chunk])
                shape = states.shape[:2]
                dy = dy_TBI[times, rows, inner]
                dc_TBHN[times, rows, head] += torch.bmm(_rows_of(dy), states.flatten(0, 1).mT).view(*shape, -1)

                dstates = room.arrays[2][: len(states)]
                torch.mul(dy[:, :, None], inputs.c_TBHN[times, rows, head, :, None], out=dstates)
                dsteps = room.steps[2]
                dsteps[len(states) - 1].add_(later)
                for q in range(len(states) - 2, -1, -1):
                    dsteps[q].addcmul_(room.steps[0][q + 1], dsteps[q + 1])
                torch.mul(decays[0], dstates[0], out=later)
                flat = dstates.flatten(0, 1)
                written = _rows_of(inputs.written_TBI[times, rows, inner])
                db_TBHN[times, rows, head] += torch.bmm(written, flat.mT).view(*shape, -1)
                dwritten = torch.bmm(_rows_of(inputs.b_TBHN[times, rows, head]), flat)
                dwritten_TBI[times, rows, inner] = dwritten.view(*shape, -1)

                dlogs = decays.mul_(dstates)  # of dt a: dS_t · decay_t · S_{t-1}; 0 where a document starts
                dlogs[0].mul_(entering[chunk])
                dlogs[1:].mul_(states[:-1])
                dlog_TBI[times, rows, inner] = torch.mul(dlogs, rates_NP, out=dstates).sum(2)
                drates_HNP[head, :, piece.channels] += dlogs.mul_(dt_TBI[times, rows, None, inner]).sum((0, 1))
        return (
            torch.addcmul(dy_BTI * d_I, dwritten_BTI, dt_BTI),
            dlog_BTI.addcmul_(dwritten_BTI, x_BTI),
            drates_HNP.mT.reshape(a_IN.shape),
            db_TBHN.transpose(0, 1),
            dc_TBHN.transpose(0, 1),
            (dy_BTI * x_BTI).sum((0, 1)),
            None,
        )
