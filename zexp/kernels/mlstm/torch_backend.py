"""The mLSTM cell in chunks, as matrix products, with a hand-written gradient.

B batch · T positions · H heads · N key width · P value width · Q chunk.

Within a chunk let b_t be the sum of the log forget gates up to t, a_j = i_j - b_j (i the input gate's exponent), and m the
stabiliser of the state that enters. Position i reads position j with weight exp(b_i + a_j) and the state with exp(b_i + m).
Divided by exp(b_i + M_i), where M_i = max(m, a_1 .. a_i), these are exp(a_j - M_i) and exp(m - M_i): at most 1, and one
of them is 1. b_i + M_i is the stabiliser m_i of the recurrence itself, so chunked and stepwise numbers are the same
to the last bits, and the state leaves the chunk with the weights of its last row.

Stabilisers cancel in h but for eps in its denominator, so gradients take them for constants, as the published kernels do
(NX-AI/mlstm_kernels); what this leaves out is eps / denominator of them. That makes the gates' gradients sums of the others:
    a_j receives <dk_j, k_j>;   b_i receives <dh_i, h_i> where the denominator is exp(-m_i), and else, the read weights of i
cancelling in num / den, eps / denominator of that; the end of a chunk receives <dC, C> + <dn, n>.

Chunks are gone through in order, so that all that is made of one stays in the cache; only the states between them are
kept for the backward pass, which makes the rest again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zexp.kernels.chunks import heads, masks_of_each_chunk, parts
from zexp.kernels.documents import Documents
from zexp.kernels.precision import at_least_fp32
from zexp.kernels.running_sum import running_sum


def mlstm(
    q_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHP: Tensor,
    input_BTH: Tensor,
    log_forget_BTH: Tensor,
    *,
    scale: float,
    eps: float,
    chunk: int,
    documents: Documents | None = None,
) -> Tensor:
    """h_t = C_t^T q_t / max(|n_t q_t|, 1), (B, T, H, P), in v's dtype; arithmetic in fp32 at least.

    C_t = f_t C_{t-1} + i_t k_t v_t^T and n_t = f_t n_{t-1} + i_t k_t with f = exp(log_forget), at most 1, and i = exp(input),
    of any size; q is multiplied by `scale`. eps is added to the denominator as it is after stabilisation: exp(-m_t) times
    the above. chunk: Q, any; the last chunk of a row may be shorter. documents: C and n are zero before every document.
    Source: xLSTM (arXiv:2405.04517), eq. (19) to (27).
    """
    with torch.autocast(v_BTHP.device.type, enabled=False):
        h_BTHP = _Mlstm.apply(q_BTHN, k_BTHN, v_BTHP, input_BTH, log_forget_BTH, scale, eps, chunk, documents)
        return h_BTHP.to(v_BTHP.dtype)


class State(NamedTuple):
    """Divided by exp(m)."""

    memory_BHNP: Tensor
    normaliser_BHN: Tensor
    m_BH: Tensor


@torch.no_grad()
def mlstm_continue(
    q_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHP: Tensor,
    input_BTH: Tensor,
    log_forget_BTH: Tensor,
    state: State,
    *,
    scale: float,
    eps: float,
    chunk: int,
) -> tuple[Tensor, State]:
    """The same from a state (zeros before the first position), and the state after the last position. No gradient.

    state: fp32 at least. One position takes the recurrence itself.
    """
    dtype = v_BTHP.dtype
    with torch.autocast(v_BTHP.device.type, enabled=False):
        inputs = (q_BTHN, k_BTHN, v_BTHP, input_BTH, log_forget_BTH)
        if v_BTHP.shape[1] == 1:
            h_BHP, state = _step(inputs, state, scale, eps)
            return h_BHP[:, None].to(dtype), state
        before = _Carried(state.memory_BHNP, state.normaliser_BHN[..., None], state.m_BH[..., None, None])
        h_BTHP, _, _, last = _forward(*inputs, scale, eps, chunk, None, before)
        return h_BTHP.to(dtype), State(last.memory, last.normaliser[..., 0], last.m[..., 0, 0])


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, input, log forget


def _step(inputs: Inputs, state: State, scale: float, eps: float) -> tuple[Tensor, State]:
    q_BHN, k_BHN, v_BHP, input_BH, log_forget_BH = (at_least_fp32(tensor[:, 0]) for tensor in inputs)
    earlier_BH = log_forget_BH + state.m_BH
    m_BH = torch.maximum(earlier_BH, input_BH)
    forget_BH1, added_BH1 = (earlier_BH - m_BH).exp_()[..., None], (input_BH - m_BH).exp_()[..., None]
    key_BHN = k_BHN * added_BH1
    memory = torch.addcmul(state.memory_BHNP * forget_BH1[..., None], key_BHN[..., None], v_BHP[..., None, :])
    normaliser = torch.addcmul(key_BHN, state.normaliser_BHN, forget_BH1)
    query_BH1N = (q_BHN * scale)[..., None, :]
    below_BH1 = torch.maximum(torch.matmul(query_BH1N, normaliser[..., None])[..., 0].abs(), (-m_BH).exp()[..., None])
    return torch.matmul(query_BH1N, memory)[..., 0, :] / (below_BH1 + eps), State(memory, normaliser, m_BH)


class _Carried(NamedTuple):
    """The state between two chunks, as it is multiplied."""

    memory: Tensor  # (B, H, N, P)
    normaliser: Tensor  # (B, H, N, 1)
    m: Tensor  # (B, H, 1, 1)


class _Weights(NamedTuple):
    """A chunk's weights; a document's boundaries have made them 0."""

    read: Tensor  # (B, H, Q, Q): scale exp(a_j - M_i), 0 above the diagonal
    entry: Tensor  # (B, H, Q, 1): scale exp(m - M_i)
    exit: Tensor  # (B, H, Q, 1): exp(a_j - M_Q)
    carry: Tensor  # (B, H, 1, 1): exp(m - M_Q)
    m: Tensor  # (B, H, Q, 1): b_i + M_i


def _zero(input_BTH: Tensor, dtype: torch.dtype) -> Tensor:
    """The stabiliser before a row."""
    return input_BTH.new_zeros(input_BTH.shape[0], input_BTH.shape[2], 1, 1, dtype=dtype)


def _weights(
    input_BTH: Tensor,
    log_forget_BTH: Tensor,
    at: slice,
    chunk: int,
    scale: float,
    documents: Documents | None,
    m_BH11: Tensor,
) -> _Weights:
    log_BHQ1 = heads(log_forget_BTH[..., None], at)
    b_BHQ1 = running_sum(log_BHQ1, 2)
    a_BHQ1 = heads(input_BTH[..., None], at) - b_BHQ1
    if documents is None:
        most_BHQ1 = torch.maximum(a_BHQ1.cummax(2).values, m_BH11)
        masks = None
    else:
        masks = masks_of_each_chunk(documents, chunk, a_BHQ1.dtype)[at.start // chunk]
        most_BHQ1 = _most_of_documents(a_BHQ1, log_BHQ1 - b_BHQ1, m_BH11, documents, at)
    # Where a document's boundary lies between, a difference may be positive; its exponential must not be infinite.
    last_BH11 = most_BHQ1[:, :, -1:]
    read = torch.sub(a_BHQ1.mT, most_BHQ1).clamp_(max=0).exp_().mul_(scale).tril_()
    entry, exits, carry = (
        (written - reader).clamp_(max=0).exp_()
        for written, reader in ((m_BH11, most_BHQ1), (a_BHQ1, last_BH11), (m_BH11, last_BH11))
    )
    entry.mul_(scale)
    if masks is not None:
        for weight, mask in zip((read, entry, exits, carry), masks, strict=True):
            weight.mul_(mask)
    return _Weights(read, entry, exits, carry, b_BHQ1 + most_BHQ1)


def _most_of_documents(a_BHQ1: Tensor, zero_BHQ1: Tensor, m_BH11: Tensor, documents: Documents, at: slice) -> Tensor:
    """M within each document. zero: what m = 0 before a position is at it: what a document that starts there is entered by.

    The maximum over the positions before is taken over 2, 4, 8 ... of them as long as they are of the same document.
    """
    ids_BQ, before_B1 = documents.ids_BT[:, at], documents.ids_BT[:, max(at.start - 1, 0), None]
    starts_BQ = ids_BQ != torch.cat((before_B1, ids_BQ[:, :-1]), dim=1)
    most_BHQ1 = torch.where(starts_BQ[:, None, :, None], torch.maximum(a_BHQ1, zero_BHQ1), a_BHQ1)
    shift = 1
    while shift < ids_BQ.shape[1]:
        same = documents.same_as_before(shift)[:, None, at.start : at.stop - shift, None]
        later, earlier = most_BHQ1[:, :, shift:], most_BHQ1[:, :, :-shift]
        grown = torch.where(same, torch.maximum(later, earlier), later)
        most_BHQ1 = torch.cat((most_BHQ1[:, :, :shift], grown), dim=2)
        shift *= 2
    entered = (ids_BQ == before_B1)[:, None, :, None]
    return torch.where(entered, torch.maximum(most_BHQ1, m_BH11), most_BHQ1)


def _forward(
    q_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHP: Tensor,
    input_BTH: Tensor,
    log_forget_BTH: Tensor,
    scale: float,
    eps: float,
    chunk: int,
    documents: Documents | None,
    carried: _Carried | None,
) -> tuple[Tensor, Tensor, list[_Carried], _Carried]:
    """h, (2, B, T, H, 1): 1 / denominator and that with the sign of n q, 0 where exp(-m) is the larger, the state that
    enters each chunk but the first, and the last one. carried: the state before the row, None = zero.
    """
    dtype = torch.promote_types(v_BTHP.dtype, torch.float32)
    h_BTHP = torch.empty_like(v_BTHP, dtype=dtype, memory_format=torch.contiguous_format)
    inverses = v_BTHP.new_empty(2, *input_BTH.shape, 1, dtype=dtype)
    entering: list[_Carried] = []
    zero_BH11 = _zero(input_BTH, dtype)
    for at in parts(v_BTHP.shape[1], chunk):
        q, k, v = (heads(tensor, at) for tensor in (q_BTHN, k_BTHN, v_BTHP))
        m_BH11 = zero_BH11 if carried is None else carried.m
        weights = _weights(input_BTH, log_forget_BTH, at, chunk, scale, documents, m_BH11)
        scores = torch.matmul(q, k.mT).mul_(weights.read)
        h, denominator = torch.matmul(scores, v), scores.sum(-1, keepdim=True)
        keys = k * weights.exit
        memory, normaliser = torch.matmul(keys.mT, v), keys.sum(2)[..., None]
        if carried is not None:
            q_entered = q * weights.entry
            h += torch.matmul(q_entered, carried.memory)
            denominator += torch.matmul(q_entered, carried.normaliser)
            memory.addcmul_(carried.memory, weights.carry)
            normaliser.addcmul_(carried.normaliser, weights.carry)
        floor = (-weights.m).exp_()
        size = denominator.abs()
        inverse = torch.maximum(size, floor).add_(eps).reciprocal_()
        h_BTHP[:, at] = h.mul_(inverse).transpose(1, 2)
        inverses[0, :, at] = inverse.transpose(1, 2)
        inverses[1, :, at] = (denominator.sign_() * (size > floor)).mul_(inverse).transpose(1, 2)
        carried = _Carried(memory, normaliser, weights.m[:, :, -1:])
        entering.append(carried)
    assert carried is not None
    return h_BTHP, inverses, entering[:-1], carried


class _Mlstm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHN: Tensor,
        k_BTHN: Tensor,
        v_BTHP: Tensor,
        input_BTH: Tensor,
        log_forget_BTH: Tensor,
        scale: float,
        eps: float,
        chunk: int,
        documents: Documents | None,
    ) -> Tensor:
        inputs = (q_BTHN, k_BTHN, v_BTHP, input_BTH, log_forget_BTH)
        h_BTHP, inverses, entering, _ = _forward(*inputs, scale, eps, chunk, documents, None)
        ctx.save_for_backward(*inputs, h_BTHP, inverses, *(tensor for state in entering for tensor in state))
        ctx.keys = (scale, eps, chunk, documents)
        return h_BTHP

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHN, k_BTHN, v_BTHP, input_BTH, log_forget_BTH, h_BTHP, inverses, *flat = ctx.saved_tensors
        scale, eps, chunk, documents = ctx.keys
        chunks = parts(v_BTHP.shape[1], chunk)
        entering = [None, *(_Carried(*flat[start : start + 3]) for start in range(0, len(flat), 3))]
        dq_BTHN, dk_BTHN, dv_BTHP = (
            torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q_BTHN, k_BTHN, v_BTHP)
        )
        dinput_BTH, dlog_BTH = (
            torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (input_BTH, log_forget_BTH)
        )
        # Both through the denominator alone: <dh, h> is what a factor of all that is read receives.
        dh_h_BTH1 = (grads[0] * h_BTHP).sum(-1, keepdim=True)
        ddenominators = (dh_h_BTH1 * inverses[1]).neg_()
        drows = torch.where(inverses[1] != 0, dh_h_BTH1 * inverses[0] * eps, dh_h_BTH1)
        zero_BH11 = _zero(input_BTH, h_BTHP.dtype)
        dmemory: Tensor | None = None
        dnormaliser: Tensor | None = None
        leaving: _Carried | None = None
        for at, state in zip(reversed(chunks), reversed(entering), strict=True):
            q, k, v, dh, inverse = (heads(x, at) for x in (q_BTHN, k_BTHN, v_BTHP, grads[0], inverses[0]))
            ddenominator, drow = heads(ddenominators, at), heads(drows, at)
            m_BH11 = zero_BH11 if state is None else state.m
            weights = _weights(input_BTH, log_forget_BTH, at, chunk, scale, documents, m_BH11)
            dread = dh * inverse
            scores = torch.matmul(q, k.mT).mul_(weights.read)
            dscores = torch.matmul(dread, v.mT).add_(ddenominator).mul_(weights.read)
            dq, dk, dv = torch.matmul(dscores, k), torch.matmul(dscores.mT, q), torch.matmul(scores.mT, dread)
            dend: Tensor | float = 0.0
            if leaving is not None and dmemory is not None and dnormaliser is not None:
                dk.addcmul_(torch.matmul(v, dmemory.mT).add_(dnormaliser.mT), weights.exit)
                dv += torch.matmul(k * weights.exit, dmemory)
                dend = (dmemory * leaving.memory).sum((2, 3)) + (dnormaliser * leaving.normaliser).sum((2, 3))
            if state is not None:
                dq.addcmul_(
                    torch.matmul(dread, state.memory.mT).addcmul_(ddenominator, state.normaliser.mT), weights.entry
                )
                q_entered = q * weights.entry
                dmemory_before = torch.matmul(q_entered.mT, dread)
                dnormaliser_before = torch.matmul(q_entered.mT, ddenominator)
                if dmemory is not None and dnormaliser is not None:
                    dmemory_before.addcmul_(dmemory, weights.carry)
                    dnormaliser_before.addcmul_(dnormaliser, weights.carry)
                dmemory, dnormaliser = dmemory_before, dnormaliser_before
            dinput = (dk * k).sum(-1, keepdim=True)
            db_BHQ = (drow - dinput)[..., 0]
            db_BHQ[..., -1] += dend
            dlog_BTH[:, at] = running_sum(db_BHQ, 2, reverse=True).transpose(1, 2)
            dinput_BTH[:, at] = dinput[..., 0].transpose(1, 2)
            for whole, own in ((dq_BTHN, dq), (dk_BTHN, dk), (dv_BTHP, dv)):
                whole[:, at] = own.transpose(1, 2)
            leaving = state
        return dq_BTHN, dk_BTHN, dv_BTHP, dinput_BTH, dlog_BTH, None, None, None, None
