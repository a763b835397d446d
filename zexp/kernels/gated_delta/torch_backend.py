"""The gated delta rule in chunks, as matrix products and one triangular inverse, with a hand-written gradient.

B batch · T positions · G key heads · N key width · H value heads · J value heads of a key head (H / G) · P value width
Q chunk. Within a chunk arrays are (B, G, J, Q, …), or (B, G, Q, J·P) where one product serves all heads of a key head.

Let c_t be the sum of the chunk's log-decays up to t, and S the state that enters it. What position t writes is u_t =
beta_t w_t with the error w_t = v_t - (what the state before it, decayed, holds for k_t). So
    (I + A) W = V - E K S,    U = beta W,    Y = E Q S + M U,    S' = exp(c_Q) S + K^T X U,
where A[t, s] = exp(c_t - c_s) <k_t, k_s> beta_s for s < t, M[t, s] = exp(c_t - c_s) <q_t, k_s> for s <= t, and E, X are
exp(c_t), exp(c_Q - c_t) on a diagonal (the WY form of Yang et al. 2024, arXiv:2406.06484, with the decays of
arXiv:2412.06464, section 3.3; the scaling by beta_s on the right of A divides by no beta). No entry of (I + A)^-1 is
above 2 for beta up to 2: each is beta_s times a product of k_t, the factors I - beta k k^T in between, by which no
vector grows, and k_s.

- Chunks are gone through in order, so that what is made of one stays in the cache. Only the states between them are
  kept: the backward pass makes the rest again.
- Decays are exponentials of differences, at most 1, also where a mask switches them off. Documents are switched off in
  the decays, thus in A and its inverse, and c starts again at each: a document shares no rounding with another.
- The gradient with respect to c needs no Q × Q array of its own: all that position t reads has the factor exp(c_t), all
  that it writes exp(-c_t), and the leaving state exp(c_Q).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zexp.kernels.chunks import OneChunkMasks, masks_of_each_chunk, parts
from zexp.kernels.documents import Documents
from zexp.kernels.precision import at_least_fp32

EPS = 1e-6  # under the root of a query's or key's length
BLOCK = 16  # of the inverse: rows that are solved one after the other; larger ones are put together by products


def gated_delta(
    q_BTGN: Tensor,
    k_BTGN: Tensor,
    v_BTHP: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    chunk: int,
    documents: Documents | None = None,
) -> Tensor:
    """y_t = S_t^T q_t / sqrt(N), (B, T, H, P), in v's dtype; arithmetic in fp32 at least.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T with q and k divided by their length,
    x / sqrt(|x|^2 + 1e-6). Key head i serves the value heads i·J to i·J + J - 1. g: log-decay, at most 0. beta: 0 to 2.
    chunk: Q, any; the last chunk of a row may be shorter. documents: the state is zero before every document.
    Source: gated DeltaNet (arXiv:2412.06464), eq. (10), where S is transposed.
    """
    with torch.autocast(v_BTHP.device.type, enabled=False):
        return _GatedDelta.apply(q_BTGN, k_BTGN, v_BTHP, g_BTH, beta_BTH, chunk, documents).to(v_BTHP.dtype)


@torch.no_grad()
def gated_delta_continue(
    q_BTGN: Tensor,
    k_BTGN: Tensor,
    v_BTHP: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    state_BGNI: Tensor,
    *,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The same from a state, and the state after the last position: (B, T, H, P) and (B, G, N, J·P). No gradient.

    state_BGNI: fp32 at least, the J value heads of a key head side by side. One position takes the recurrence itself.
    """
    dtype = v_BTHP.dtype
    with torch.autocast(v_BTHP.device.type, enabled=False):
        if v_BTHP.shape[1] > 1:
            y_BTHP, _, state = _forward(q_BTGN, k_BTGN, v_BTHP, g_BTH, beta_BTH, chunk, None, state_BGNI)
            return y_BTHP.to(dtype), state
        q, k, v, g, beta = (at_least_fp32(tensor) for tensor in (q_BTGN, k_BTGN, v_BTHP, g_BTH, beta_BTH))
        shape = (k.shape[2], v.shape[2] // k.shape[2])  # (G, J)
        q_BG1N, k_BG1N = (tensor.transpose(1, 2) * _inverse_length(tensor.transpose(1, 2)) for tensor in (q, k))
        v_BGJP, g_BGJ1, beta_BGJ1 = (
            v[:, 0].unflatten(1, shape),
            g[:, 0, :, None].unflatten(1, shape),
            beta[:, 0, :, None].unflatten(1, shape),
        )
        decayed_BGNJP = state_BGNI.unflatten(-1, v_BGJP.shape[2:]) * g_BGJ1.exp()[:, :, None]
        state_BGNI = decayed_BGNJP.flatten(3)
        error_BGJP = v_BGJP - torch.matmul(k_BG1N, state_BGNI).view(v_BGJP.shape)
        state_BGNI = state_BGNI.addcmul_(k_BG1N.mT, (beta_BGJ1 * error_BGJP).flatten(2)[:, :, None])
        y = torch.matmul(q_BG1N, state_BGNI).mul_(q.shape[-1] ** -0.5)
        return y.view(v.shape).to(dtype), state_BGNI


def _inverse_length(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True).add_(EPS).rsqrt_()


def _inverse(lower: Tensor) -> Tensor:
    """(I + L)^-1 of the strictly lower triangle L of (…, Q, Q); nothing else of it is read.

    [[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]], from blocks of 16 upwards: two thirds of the time of
    solving Q rows one after the other.
    """
    size = lower.shape[-1]
    doublings = (size // BLOCK).bit_length() - 1
    if size % BLOCK or doublings < 1 or size != BLOCK << doublings:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, identity.expand(lower.shape), upper=False, unitriangular=True)
    inverse = torch.zeros_like(lower)
    _diagonal_blocks(inverse, BLOCK).copy_(_inverse(_diagonal_blocks(lower, BLOCK)))
    for half in (BLOCK << number for number in range(doublings)):
        blocks = _diagonal_blocks(inverse, 2 * half)
        first, last = blocks[..., :half, :half], blocks[..., half:, half:]
        below = torch.matmul(_diagonal_blocks(lower, 2 * half)[..., half:, :half], first)
        torch.neg(torch.matmul(last, below), out=blocks[..., half:, :half])
    return inverse


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """(…, Q / size, size, size), a view."""
    count = matrix.shape[-1] // size
    cut = matrix.unflatten(-1, (count, size)).unflatten(-3, (count, size))
    return cut.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


class _Inputs(NamedTuple):
    """One chunk's inputs, contiguous."""

    q: Tensor  # (B, G, Q, N): of length 1 / sqrt(N)
    k: Tensor  # (B, G, Q, N): of length 1
    v: Tensor  # (B, G, J, Q, P)
    beta: Tensor  # (B, G, J, Q, 1)
    q_inverse: Tensor  # (B, G, Q, 1): 1 / (the query's length as it came)
    k_inverse: Tensor


class _Chunk(NamedTuple):
    """What a chunk is made of, before the state that enters it is known."""

    sums: Tensor  # (1 or B, Q, Q): adds up what a position and those of its document before it have
    decays: Tensor  # (B, G, J, Q, Q): anything above the diagonal
    keys: Tensor  # (B, G, 1, Q, Q): <k_t, k_s>
    reads: Tensor  # M, (B, G, J, Q, Q)
    inverse: Tensor  # (I + A)^-1, (B, G, J, Q, Q)
    entry: Tensor  # E, (B, G, J, Q, 1)
    exits: Tensor  # X, (B, G, J, Q, 1)
    carry: Tensor  # exp(c_Q), (B, G, 1, J, 1)


def _heads(tensor_BTHP: Tensor, at: slice, groups: int) -> Tensor:
    """(B, T, H, P) at some positions as (B, G, J, Q, P), contiguous and in fp32 at least."""
    return at_least_fp32(tensor_BTHP[:, at].unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).contiguous())


def _side_by_side(heads: Tensor) -> Tensor:
    """(B, G, J, Q, P) as (B, G, Q, J·P)."""
    return heads.transpose(2, 3).flatten(3)


def _apart(columns: Tensor, heads: int) -> Tensor:
    """(B, G, Q, J·P) as (B, G, J, Q, P), a view."""
    return columns.unflatten(3, (heads, -1)).transpose(2, 3)


def _inputs(q_BTGN: Tensor, k_BTGN: Tensor, v_BTHP: Tensor, beta_BTH: Tensor, at: slice) -> _Inputs:
    groups, keys = k_BTGN.shape[2:]
    q, k = (at_least_fp32(tensor[:, at].transpose(1, 2).contiguous()) for tensor in (q_BTGN, k_BTGN))
    q_inverse, k_inverse = _inverse_length(q), _inverse_length(k)
    beta = _heads(beta_BTH[..., None], at, groups)
    return _Inputs(q * (q_inverse * keys**-0.5), k * k_inverse, _heads(v_BTHP, at, groups), beta, q_inverse, k_inverse)


def _sums(like: Tensor, masks: OneChunkMasks | None) -> Tensor:
    if masks is not None:
        return masks.pair_B1QQ[:, 0, 0]
    size = like.shape[2]
    return torch.ones(1, size, size, dtype=like.dtype, device=like.device).tril_()


def _chunk(inputs: _Inputs, g_BTH: Tensor, at: slice, chunk: int, documents: Documents | None) -> _Chunk:
    q, k = inputs.q, inputs.k
    masks = None
    if documents is not None:
        own = masks_of_each_chunk(documents, chunk, k.dtype)[at.start // chunk]
        masks = OneChunkMasks(*(mask[:, :, None] for mask in own))
    sums = _sums(k, masks)
    cum = _heads(torch.matmul(sums, at_least_fp32(g_BTH[:, at]))[..., None], slice(None), k.shape[1])
    end = cum[..., -1:, :]
    decays = (cum - cum.mT).clamp_(max=0).exp_()
    entry, exits, carry = cum.exp(), (end - cum).clamp_(max=0).exp_(), end.exp().transpose(2, 3)
    if masks is not None:
        decays *= masks.pair_B1QQ
        entry, exits, carry = entry * masks.entry_B1Q1, exits * masks.exit_B1Q1, carry * masks.carry_B111
    keys = torch.matmul(k, k.mT)[:, :, None]
    inverse = _inverse((decays * keys).mul_(inputs.beta.mT))
    reads = (decays * torch.matmul(q, k.mT)[:, :, None]).tril_()
    return _Chunk(sums, decays, keys, reads, inverse, entry, exits, carry)


def _errors(inputs: _Inputs, one: _Chunk, state: Tensor | None) -> Tensor:
    """W, (B, G, J, Q, P)."""
    if state is None:
        return torch.matmul(one.inverse, inputs.v)
    held = _apart(torch.matmul(inputs.k, state), inputs.v.shape[2])
    return torch.matmul(one.inverse, torch.addcmul(inputs.v, one.entry, held, value=-1))


def _carried(state: Tensor, one: _Chunk) -> Tensor:
    """(B, G, N, J·P), decayed over the chunk."""
    return (state.unflatten(3, (one.carry.shape[3], -1)) * one.carry).flatten(3)


def _forward(
    q_BTGN: Tensor,
    k_BTGN: Tensor,
    v_BTHP: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    chunk: int,
    documents: Documents | None,
    state: Tensor | None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Outputs, the state that enters each chunk but the first, and the last one. state: before the row, None = zero."""
    y_BTHP = at_least_fp32(torch.empty_like(v_BTHP, memory_format=torch.contiguous_format))
    y_BTGJP = y_BTHP.unflatten(2, (k_BTGN.shape[2], -1))
    entering: list[Tensor] = []
    for at in parts(v_BTHP.shape[1], chunk):
        inputs = _inputs(q_BTGN, k_BTGN, v_BTHP, beta_BTH, at)
        one = _chunk(inputs, g_BTH, at, chunk, documents)
        written = _errors(inputs, one, state).mul_(inputs.beta)
        y = torch.matmul(one.reads, written)
        leaving = torch.matmul(inputs.k.mT, _side_by_side(written.mul_(one.exits)))
        if state is not None:
            y.addcmul_(one.entry, _apart(torch.matmul(inputs.q, state), y.shape[2]))
            leaving += _carried(state, one)
        state = leaving
        y_BTGJP[:, at] = y.permute(0, 3, 1, 2, 4)
        entering.append(state)
    assert state is not None
    return y_BTHP, entering[:-1], state


class _GatedDelta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTGN: Tensor,
        k_BTGN: Tensor,
        v_BTHP: Tensor,
        g_BTH: Tensor,
        beta_BTH: Tensor,
        chunk: int,
        documents: Documents | None,
    ) -> Tensor:
        y_BTHP, entering, _ = _forward(q_BTGN, k_BTGN, v_BTHP, g_BTH, beta_BTH, chunk, documents, None)
        ctx.save_for_backward(q_BTGN, k_BTGN, v_BTHP, g_BTH, beta_BTH, y_BTHP, *entering)
        ctx.chunk, ctx.documents = chunk, documents
        return y_BTHP

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BTGN, k_BTGN, v_BTHP, g_BTH, beta_BTH, y_BTHP, *entering = ctx.saved_tensors
        groups = k_BTGN.shape[2]
        made = [torch.empty_like(tensor) for tensor in (q_BTGN, k_BTGN, v_BTHP, g_BTH, beta_BTH)]
        chunks = parts(v_BTHP.shape[1], ctx.chunk)
        states = [None, *entering, None]  # the last one is not read
        dstate: Tensor | None = None
        for number in range(len(chunks) - 1, -1, -1):
            at = chunks[number]
            inputs = _inputs(q_BTGN, k_BTGN, v_BTHP, beta_BTH, at)
            one = _chunk(inputs, g_BTH, at, ctx.chunk, ctx.documents)
            y, dy = _heads(y_BTHP, at, groups), _heads(grads[0], at, groups)
            found, dstate = _chunk_backward(inputs, one, y, dy, states[number], states[number + 1], dstate)
            for whole, own in zip(made, found, strict=True):
                whole[:, at] = own
        return *made, None, None


def _chunk_backward(
    inputs: _Inputs,
    one: _Chunk,
    y: Tensor,
    dy: Tensor,
    state: Tensor | None,
    leaving: Tensor | None,
    dleaving: Tensor | None,
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of q, k, v, g, beta at the chunk's positions, (B, Q, …), and of the state that enters it.

    leaving, dleaving: the state that leaves it, and its gradient; None = nothing reads that one.
    """
    q, k, v, beta = inputs[:4]
    heads = v.shape[2]
    errors = _errors(inputs, one, state)
    written = errors * beta

    # Of what is written, by outputs and by the leaving state; then, through (I + A)^-1, of V - E K S.
    dwritten = torch.matmul(one.reads.mT, dy)
    if dleaving is not None:
        dwritten.addcmul_(one.exits, _apart(torch.matmul(k, dleaving), heads))
    dv = torch.matmul(one.inverse.mT, dwritten * beta)
    dreads = torch.matmul(dy, written.mT).mul_(one.decays).tril_()
    dkeys = torch.matmul(dv, errors.mT).mul_(one.decays).tril_(-1)  # less its sign, and beta
    dbeta = (dwritten * errors).sum(-1, keepdim=True).sub_((dkeys * one.keys).sum(-2)[..., None])

    # Of the summed log-decays: reading, writing.
    dcum = (dy * y).sum(-1, keepdim=True).sub_((v - errors).mul_(dv).sum(-1, keepdim=True)).sub_(beta * dbeta)

    # Of queries and keys, the value heads of a key head together.
    dkeys_GQQ = dkeys.mul_(beta.mT).sum(2)
    dreads_GQQ = dreads.sum(2)
    dq = torch.matmul(dreads_GQQ, k)
    dk = torch.matmul(dreads_GQQ.mT, q).sub_(torch.matmul(dkeys_GQQ + dkeys_GQQ.mT, k))
    if dleaving is not None:
        assert leaving is not None
        dk += torch.matmul(_side_by_side(written.mul_(one.exits)), dleaving.mT)
        ended = (dleaving * leaving).sum(2).unflatten(2, (heads, -1)).sum(-1)  # (B, G, J)
        dcum[..., -1, 0] += ended
        dleaving = _carried(dleaving, one)
    dentering = dleaving
    if state is not None:
        doutput, dheld = _side_by_side(dy * one.entry), _side_by_side(dv * one.entry)
        dq += torch.matmul(doutput, state.mT)
        dk -= torch.matmul(dheld, state.mT)
        dentering = torch.matmul(q.mT, doutput).sub_(torch.matmul(k.mT, dheld))
        if dleaving is not None:
            dentering += dleaving
    scale = q.shape[-1] ** -0.5
    dq = _length_backward(dq, q * (1 / scale), inputs.q_inverse * scale)
    dk = _length_backward(dk, k, inputs.k_inverse)
    dv, dcum, dbeta = (tensor.permute(0, 3, 1, 2, 4).flatten(2, 3) for tensor in (dv, dcum, dbeta))
    dg = torch.matmul(one.sums.mT, dcum.squeeze(-1))
    return [dq.transpose(1, 2), dk.transpose(1, 2), dv, dg, dbeta.squeeze(-1)], dentering


def _length_backward(dunit: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of x from that of x / |x|, times what `inverse` holds beyond 1 / |x|."""
    along = (dunit * unit).sum(-1, keepdim=True)
    return dunit.addcmul_(unit, along, value=-1).mul_(inverse)
