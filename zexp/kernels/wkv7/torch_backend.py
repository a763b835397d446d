"""RWKV-7's state update in chunks, as matrix products and one triangular inverse, with a hand-written gradient.

B batch · T positions · H heads · N key width · P value width · Q chunk · C chunks (T / Q); after a part is cut out, C is
the number of its chunks, and arrays are (C, B, H, rows, columns).

Within a chunk let g_t be the sum of the log-decays up to t, S the state that enters, and u_t = -kappa_t^T S_{t-1} what
position t removes. Then S_t = exp(g_t) S + sum over s <= t of exp(g_t - g_s) (b_s u_s^T + k_s v_s^T) with b = a * kappa, so
    (I - A) U = K S + A' V,    Y = R S + E U + E' V,
where row t of K is -kappa_t exp(g_{t-1}), of R is r_t exp(g_t), and A, A' (s < t), E, E' (s <= t) are their products with
b_s exp(-g_s) and k_s exp(-g_s). A is strictly lower triangular; its inverse makes the step from one chunk's state to
the next one product, S' = M S + m, which is all that is done in order. (The delta rule's form of Yang et al. 2024,
arXiv:2406.06484, with a decay per channel.)

exp(-g_s) grows. RWKV-7's decay is exp(-exp(-1/2) sigmoid(.)) > 0.545, so g > -0.607 a position and a chunk of 32 has
exp(-g) < 2.7e8: far from fp32's 3.4e38, also where masked entries multiply two of them with values up to 1e10. Every
term that is kept is a product of one such factor and a smaller one, exact to a few roundings, so nothing is lost.

Arrays of a chunk are made for some chunks at a time and never kept: the backward pass makes them again from the
inputs and the states that enter the chunks.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zexp.kernels.chunks import chunk_masks
from zexp.kernels.documents import Documents
from zexp.kernels.precision import at_least_fp32
from zexp.kernels.running_sum import running_sum
from zexp.kernels.wkv7.chunk import CHUNK

FASTEST = math.exp(-0.5)  # the largest decay of a position, in nats: 0.607

PART_ELEMENTS = 1 << 17  # of a Q × N array of all heads: about twenty of them are alive at once


def wkv7(
    r_BTHN: Tensor,
    w_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHP: Tensor,
    kappa_BTHN: Tensor,
    a_BTHN: Tensor,
    *,
    documents: Documents | None = None,
) -> Tensor:
    """y_t = S_t^T r_t, (B, T, H, P), in v's dtype; arithmetic in fp32 at least.

    S_t = (diag(exp(w_t)) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T, where S is (N, P) and zero before every
    document. w: log-decay, -0.607 < w <= 0 as RWKV-7 makes it. kappa: of norm 1 at most. a: between 0 and 1.
    Source: RWKV-7 (arXiv:2503.14456), section 4.1.
    """
    with torch.autocast(v_BTHP.device.type, enabled=False):
        inputs, size = _padded((r_BTHN, w_BTHN, k_BTHN, v_BTHP, kappa_BTHN, a_BTHN))
        return _Wkv7.apply(*inputs, size, documents)[:, : v_BTHP.shape[1]].to(v_BTHP.dtype)


@torch.no_grad()
def wkv7_continue(
    r_BTHN: Tensor,
    w_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHP: Tensor,
    kappa_BTHN: Tensor,
    a_BTHN: Tensor,
    state_BHNP: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same from a state, and the state after the last position: (B, T, H, P) and (B, H, N, P). No gradient.

    state_BHNP: fp32 at least. One position takes the recurrence itself.
    """
    length, dtype = v_BTHP.shape[1], v_BTHP.dtype
    with torch.autocast(v_BTHP.device.type, enabled=False):
        if length == 1:
            r, w, k, v, kappa, a = (
                at_least_fp32(tensor)[:, 0, :, :, None]
                for tensor in (r_BTHN, w_BTHN, k_BTHN, v_BTHP, kappa_BTHN, a_BTHN)
            )
            found_BH1P = torch.matmul(kappa.mT, state_BHNP)
            state = (state_BHNP * w.exp()).addcmul_(a * kappa, found_BH1P, value=-1).addcmul_(k, v.mT)
            return torch.matmul(r.mT, state).transpose(1, 2).to(dtype), state
        inputs, size = _padded((r_BTHN, w_BTHN, k_BTHN, v_BTHP, kappa_BTHN, a_BTHN))
        y_BTHP, _, state = _forward(inputs, size, None, state_BHNP)
        return y_BTHP[:, :length].to(dtype), state


def _padded(inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], int]:
    """In fp32 at least, of whole chunks, and the chunk's size. Padded positions neither decay, write nor read."""
    length = inputs[0].shape[1]
    size = min(CHUNK, length)
    padding = -length % size
    high = [at_least_fp32(tensor) for tensor in inputs]
    return ([F.pad(tensor, (0, 0, 0, 0, 0, padding)) for tensor in high] if padding else high), size


def log_decay(x: Tensor) -> Tensor:
    """The log-decay -exp(-1/2) sigmoid(x) of RWKV-7 (arXiv:2503.14456, section 4.1), in fp32 at least."""
    return _LogDecay.apply(x)


class _LogDecay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        w = at_least_fp32(x).sigmoid().mul_(-FASTEST)
        ctx.save_for_backward(w)
        ctx.dtype = x.dtype
        return w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return torch.addcmul(w, w, w, value=1 / FASTEST).mul_(grads[0]).to(ctx.dtype)  # w (1 - sigmoid)


class _Masks(NamedTuple):
    """What is switched off, as 0 or 1.

    pair: t reading s, (2Q, 2Q), with documents (C, B, 1, 2Q, 2Q): rows are removals, then outputs; columns b, then k.
    documents: whether t reads the state that enters the chunk (C, B, 1, 2Q, 1), whether s writes into the one that
    leaves it (the same shape), and whether the entering state reaches the leaving one (C, B, 1, 1, 1).
    """

    pair: Tensor
    documents: tuple[Tensor, Tensor, Tensor] | None = None

    def part(self, part: slice) -> _Masks:
        if self.documents is None:
            return self
        entry, leave, through = self.documents
        return _Masks(self.pair[part], (entry[part], leave[part], through[part]))


def _masks(like: Tensor, chunk: int, documents: Documents | None) -> _Masks:
    order = like.new_ones(chunk, chunk).tril()
    pair = torch.cat((order.tril(-1), order)).repeat(1, 2)
    if documents is None:
        return _Masks(pair)
    return documents.once(("wkv7", chunk, like.dtype), lambda: _masks_of_documents(documents, pair))


def _masks_of_documents(documents: Documents, pair: Tensor) -> _Masks:
    masks = chunk_masks(documents, len(pair) // 2, pair.dtype)
    entry, leave = (
        mask.transpose(0, 1).repeat(1, 1, 2)[:, :, None, :, None] for mask in (masks.entry_BCQ, masks.exit_BCQ)
    )
    same = masks.pair_BCQQ.transpose(0, 1)[:, :, None]
    through = masks.carry_BC.t()[:, :, None, None, None]
    return _Masks(same.repeat(1, 1, 1, 2, 2).mul_(pair), (entry, leave, through))


class _Chunks(NamedTuple):
    """What a part's chunks are made of, before any state is known."""

    grown: Tensor  # exp(g_t), (C, B, H, Q, N)
    before: Tensor  # exp(g_{t-1})
    shrunk: Tensor  # exp(-g_s)
    reads: Tensor  # (…, 2Q, N): K, then R
    writes: Tensor  # (…, 2Q, N): b_s exp(-g_s), then k_s exp(-g_s)
    scores: Tensor  # (…, 2Q, 2Q): A, A' above E, E'
    inverse: Tensor  # (I - A)^-1
    state_reads: Tensor  # reads, where the entering state is the document's own
    exits: Tensor  # writes, decayed to the chunk's end
    carry: Tensor  # (…, 1, N): what the entering state is multiplied by until there


def _chunks(inputs: list[Tensor], masks: _Masks) -> _Chunks:
    """inputs: r, w, k, v, kappa, a, each (C, B, H, Q, N)."""
    r, w, k, _, kappa, a = inputs
    size = r.shape[3]
    grown = running_sum(w, 3).exp_()
    before = torch.cat((torch.ones_like(grown[..., :1, :]), grown[..., :-1, :]), dim=3)
    shrunk = grown.reciprocal()
    reads = torch.cat((kappa * before.neg(), r * grown), dim=3)
    writes = torch.cat((kappa * a * shrunk, k * shrunk), dim=3)
    scores = torch.matmul(reads, writes.mT).mul_(masks.pair)
    identity = torch.eye(size, dtype=r.dtype, device=r.device)
    inverse = torch.linalg.solve_triangular(
        identity - scores[..., :size, :size],
        identity.expand(*scores.shape[:3], -1, -1),
        upper=False,
        unitriangular=True,
    )
    end = grown[..., -1:, :]
    state_reads, exits, carry = reads, writes * end, end
    if masks.documents is not None:
        entry, leave, through = masks.documents
        state_reads, exits, carry = reads * entry, exits.mul_(leave), end * through
    return _Chunks(grown, before, shrunk, reads, writes, scores, inverse, state_reads, exits, carry)


def _cut(tensor: Tensor, chunk: int) -> Tensor:
    """(B, T, H, N) as (C, B, H, Q, N), a view."""
    return tensor.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4)


def _parts(tensor_CBHQN: Tensor) -> list[slice]:
    count = tensor_CBHQN.shape[0]
    chunks = max(1, PART_ELEMENTS // tensor_CBHQN[0].numel())
    return [slice(start, min(start + chunks, count)) for start in range(0, count, chunks)]


def _forward(
    inputs: list[Tensor], chunk: int, documents: Documents | None, initial_BHNP: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, H, P), the state that enters each chunk (C, B, H, N, P), and the state after the last."""
    y_BTHP = torch.empty_like(inputs[3])
    cut = [_cut(tensor, chunk) for tensor in inputs]
    (count, batch, heads, _, keys), values = cut[0].shape, cut[3].shape[-1]
    masks = _masks(inputs[0], chunk, documents)
    states = y_BTHP.new_empty(count, batch, heads, keys, values)
    state = y_BTHP.new_zeros(batch, heads, keys, values) if initial_BHNP is None else initial_BHNP
    for part in _parts(cut[0]):
        pieces = [tensor[part] for tensor in cut]
        one = _chunks(pieces, masks.part(part))
        v, scores = pieces[3].contiguous(), one.scores
        # Columns: what multiplies the entering state, then what is added.
        added = torch.matmul(scores[..., :chunk, chunk:], v)
        solved = torch.matmul(one.inverse, torch.cat((one.state_reads[..., :chunk, :], added), dim=-1))
        step = torch.matmul(one.exits[..., :chunk, :].mT, solved)
        step[..., keys:] += torch.matmul(one.exits[..., chunk:, :].mT, v)
        step[..., :keys].diagonal(dim1=-2, dim2=-1).add_(one.carry[..., 0, :])
        out = torch.matmul(scores[..., chunk:, :chunk], solved)
        out[..., :keys] += one.state_reads[..., chunk:, :]
        out[..., keys:] += torch.matmul(scores[..., chunk:, chunk:], v)
        for number in range(part.start, part.stop):
            states[number] = state
            now = step[number - part.start]
            state = torch.matmul(now[..., :keys], state).add_(now[..., keys:])
        _cut(y_BTHP, chunk)[part] = torch.matmul(out[..., :keys], states[part]).add_(out[..., keys:])
    return y_BTHP, states, state


class _Wkv7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        kappa: Tensor,
        a: Tensor,
        chunk: int,
        documents: Documents | None,
    ) -> Tensor:
        y_BTHP, states, _ = _forward([r, w, k, v, kappa, a], chunk, documents, None)
        ctx.save_for_backward(r, w, k, v, kappa, a, states)
        ctx.chunk, ctx.documents = chunk, documents
        return y_BTHP

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, states = ctx.saved_tensors
        chunk = ctx.chunk
        masks = _masks(inputs[0], chunk, ctx.documents)
        cut = [_cut(tensor, chunk) for tensor in inputs]
        made = [torch.empty_like(tensor) for tensor in inputs]
        gradients = [_cut(tensor, chunk) for tensor in made]
        dy_CBHQP = _cut(grads[0], chunk)
        dstate = torch.zeros_like(states[0])  # of the state that leaves the part
        following = torch.zeros_like(dstate)  # that state itself: nothing reads the last one
        for part in reversed(_parts(cut[0])):
            found, dstate = _part_backward(
                [tensor[part] for tensor in cut], dy_CBHQP[part], states[part], masks.part(part), dstate, following
            )
            following = states[part.start]
            for whole, piece in zip(gradients, found, strict=True):
                whole[part] = piece
        return *made, None, None


def _part_backward(
    inputs: list[Tensor], dy: Tensor, states: Tensor, masks: _Masks, dafter: Tensor, after: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Gradients of r, w, k, v, kappa, a of some chunks, and of the state that enters the first of them.

    after, dafter: the state that leaves the last of them, and its gradient.
    """
    v, kappa, a = inputs[3:]
    one = _chunks(inputs, masks)
    size, scores = one.inverse.shape[-1], one.scores
    v, dy = v.contiguous(), dy.contiguous()
    removal_reads, output_reads = one.state_reads.split(size, dim=3)
    removed = torch.matmul(removal_reads, states).add_(torch.matmul(scores[..., :size, size:], v))
    removed = torch.matmul(one.inverse, removed)  # U

    # The gradient of each chunk's entering state, in order.
    through = torch.matmul(one.inverse, removal_reads)
    step = torch.matmul(one.exits[..., :size, :].mT, through)
    step.diagonal(dim1=-2, dim2=-1).add_(one.carry[..., 0, :])
    entered = torch.matmul(scores[..., size:, :size], through).add_(output_reads)
    local = torch.matmul(entered.mT, dy)
    dleaving = torch.empty_like(states)
    for number in range(len(states) - 1, -1, -1):
        dleaving[number] = dafter
        dafter = torch.matmul(step[number].mT, dafter).add_(local[number])

    # Of U, of the right-hand side of its equation, and of V.
    from_state = torch.matmul(one.exits, dleaving)  # (…, 2Q, P)
    from_output = torch.matmul(scores[..., size:, :].mT, dy)
    dsolved = torch.matmul(one.inverse.mT, from_output[..., :size, :] + from_state[..., :size, :])
    dv = torch.matmul(scores[..., :size, size:].mT, dsolved)
    dv += from_output[..., size:, :]
    dv += from_state[..., size:, :]

    # Of what reads and what writes.
    drows = torch.cat((dsolved, dy), dim=3)
    columns = torch.cat((removed, v), dim=3)
    dscores = torch.matmul(drows, columns.mT).mul_(masks.pair)
    dreads = torch.matmul(drows, states.mT)
    dexits = torch.matmul(columns, dleaving.mT)
    if masks.documents is not None:
        dreads *= masks.documents[0]
        dexits *= masks.documents[1]
    dreads += torch.matmul(dscores, one.writes)
    dwrites = torch.matmul(dscores.mT, one.reads).addcmul_(dexits, one.grown[..., -1:, :])

    # Of the sums of log-decays: a read has exp(g), a write exp(-g), the leaving state exp(g) of the chunk's end.
    dread_log, dwrite_log = dreads * one.reads, dwrites * one.writes
    dbefore, dnow = dread_log.split(size, dim=3)
    dnow -= dwrite_log[..., :size, :]
    dnow -= dwrite_log[..., size:, :]
    leaving = torch.cat((states[1:], after[None]))
    dnow[..., -1, :] += (leaving * dleaving).sum(-1)
    dnow[..., :-1, :] += dbefore[..., 1:, :]  # exp(g_{t-1}) is a read of position t; the first one's is 1
    dw = running_sum(dnow, 3, reverse=True)

    dremoval, doutput = dreads.split(size, dim=3)
    db, dk = (dwrites * one.shrunk.repeat(1, 1, 1, 2, 1)).split(size, dim=3)
    dkappa = (db * a).addcmul_(dremoval, one.before, value=-1)
    return [doutput * one.grown, dw, dk, dv, dkappa, db * kappa], dafter
