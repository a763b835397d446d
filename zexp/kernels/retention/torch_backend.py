"""Retention in chunks, as matrix products, with a hand-written gradient.

B batch · T positions · H heads · N key width · P value width · Q chunk.

The decays are constants, so their powers are tables: within a chunk D (H, Q, Q), for reading the state that enters it
gamma^(i+1), for writing into the state that leaves it gamma^(Q-1-j), between the two gamma^Q (RetNet, arXiv:2307.08621,
eq. 7). They are taken in fp64 before they are rounded. Chunks are gone through in order, so that all that is made of
one stays in the cache; only the states between them are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zexp.kernels.chunks import heads, masks_of_each_chunk, parts
from zexp.kernels.documents import Documents
from zexp.kernels.precision import at_least_fp32


def retention(
    q_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHP: Tensor,
    log_decays: tuple[float, ...],
    *,
    scale: float,
    chunk: int,
    documents: Documents | None = None,
) -> Tensor:
    """y_t = scale S_t^T q_t with S_t = gamma S_{t-1} + k_t v_t^T, (B, T, H, P), in v's dtype; arithmetic in fp32 at least.

    log_decays: log gamma of each head, at most 0. chunk: Q, any; the last chunk of a row may be shorter.
    documents: the state is zero before every document. Source: RetNet (arXiv:2307.08621), eq. (6).
    """
    with torch.autocast(v_BTHP.device.type, enabled=False):
        return _Retention.apply(q_BTHN, k_BTHN, v_BTHP, log_decays, scale, chunk, documents)


@torch.no_grad()
def retention_continue(
    q_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHP: Tensor,
    log_decays: tuple[float, ...],
    state_BHNP: Tensor,
    *,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The same from a state, and the state after the last position: (B, T, H, P) and (B, H, N, P). No gradient.

    state_BHNP: fp32 at least. One position takes the recurrence itself.
    """
    dtype = v_BTHP.dtype
    with torch.autocast(v_BTHP.device.type, enabled=False):
        if v_BTHP.shape[1] == 1:
            q, k, v = (at_least_fp32(tensor) for tensor in (q_BTHN, k_BTHN, v_BTHP))
            carry_H11 = _tables(log_decays, 1, 1.0, v.device, state_BHNP.dtype).carry_H11
            state = torch.addcmul(state_BHNP * carry_H11, k[:, 0, :, :, None], v[:, 0, :, None, :])
            y_BH1P = torch.matmul(q[:, 0, :, None, :] * scale, state)
            return y_BH1P.transpose(1, 2).to(dtype), state
        y_BTHP, _, state = _forward(q_BTHN, k_BTHN, v_BTHP, log_decays, scale, chunk, None, state_BHNP)
        return y_BTHP, state


class _Tables(NamedTuple):
    """Powers of gamma for one chunk, after its masks where there are any."""

    pair: Tensor  # (H, Q, Q): scale gamma^(i - j), 0 above the diagonal
    entry: Tensor  # (H, Q, 1): scale gamma^(i + 1)
    exit: Tensor  # (H, Q, 1): gamma^(Q - 1 - j)
    carry_H11: Tensor  # gamma^Q


@lru_cache(maxsize=32)
def _tables(
    log_decays: tuple[float, ...], size: int, scale: float, device: torch.device, dtype: torch.dtype
) -> _Tables:
    with torch.no_grad():
        log_H11 = torch.tensor(log_decays, dtype=torch.float64, device=device)[:, None, None]
        position_Q = torch.arange(size, dtype=torch.float64, device=device)
        distance_QQ = position_Q[:, None] - position_Q
        pair = (log_H11 * distance_QQ.clamp(min=0)).exp().tril() * scale
        entry = (log_H11 * (position_Q[:, None] + 1)).exp() * scale
        exits = (log_H11 * (size - 1 - position_Q[:, None])).exp()
        return _Tables(*(table.to(dtype) for table in (pair, entry, exits, (log_H11 * size).exp())))


class _Chunk(NamedTuple):
    """Which positions, the weights of all heads there, and what of them lies in one document (None = all)."""

    at: slice
    pair: Tensor
    pair_mask: Tensor | None
    entry: Tensor
    exit: Tensor
    carry: Tensor

    def weigh_(self, scores_BHQQ: Tensor) -> Tensor:
        scores_BHQQ *= self.pair
        return scores_BHQQ if self.pair_mask is None else scores_BHQQ.mul_(self.pair_mask)


def _chunks(
    like_BTHP: Tensor, log_decays: tuple[float, ...], scale: float, chunk: int, documents: Documents | None
) -> Iterator[_Chunk]:
    length, dtype = like_BTHP.shape[1], torch.promote_types(like_BTHP.dtype, torch.float32)
    each = None if documents is None else masks_of_each_chunk(documents, chunk, dtype)
    for number, at in enumerate(parts(length, chunk)):
        tables = _tables(log_decays, at.stop - at.start, scale, like_BTHP.device, dtype)
        if each is None:
            yield _Chunk(at, tables.pair, None, tables.entry, tables.exit, tables.carry_H11)
            continue
        masks = each[number]
        yield _Chunk(
            at,
            tables.pair,
            masks.pair_B1QQ,
            tables.entry * masks.entry_B1Q1,
            tables.exit * masks.exit_B1Q1,
            tables.carry_H11 * masks.carry_B111,
        )


def _forward(
    q_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHP: Tensor,
    log_decays: tuple[float, ...],
    scale: float,
    chunk: int,
    documents: Documents | None,
    state: Tensor | None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Outputs, the state that enters each chunk but the first, and the last one. state: before the row, None = zero."""
    y_BTHP = torch.empty_like(v_BTHP, memory_format=torch.contiguous_format)
    entering: list[Tensor] = []
    for part in _chunks(v_BTHP, log_decays, scale, chunk, documents):
        q, k, v = (heads(tensor, part.at) for tensor in (q_BTHN, k_BTHN, v_BTHP))
        y = torch.matmul(part.weigh_(torch.matmul(q, k.mT)), v)
        written = torch.matmul((k * part.exit).mT, v)
        if state is None:
            state = written
        else:
            y += torch.matmul(q * part.entry, state)
            state = written.addcmul_(state, part.carry)
        y_BTHP[:, part.at] = y.transpose(1, 2)
        entering.append(state)
    assert state is not None
    return y_BTHP, entering[:-1], state


class _Retention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHN: Tensor,
        k_BTHN: Tensor,
        v_BTHP: Tensor,
        log_decays: tuple[float, ...],
        scale: float,
        chunk: int,
        documents: Documents | None,
    ) -> Tensor:
        y_BTHP, entering, _ = _forward(q_BTHN, k_BTHN, v_BTHP, log_decays, scale, chunk, documents, None)
        ctx.save_for_backward(q_BTHN, k_BTHN, v_BTHP, *entering)
        ctx.keys = (log_decays, scale, chunk, documents)
        return y_BTHP

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHN, k_BTHN, v_BTHP, *entering = ctx.saved_tensors
        dq_BTHN, dk_BTHN, dv_BTHP = (
            torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q_BTHN, k_BTHN, v_BTHP)
        )
        log_decays, scale, chunk, documents = ctx.keys
        chunks = list(_chunks(v_BTHP, log_decays, scale, chunk, documents))
        dstate: Tensor | None = None
        for part, state in zip(reversed(chunks), reversed([None, *entering]), strict=True):
            q, k, v, dy = (heads(tensor, part.at) for tensor in (q_BTHN, k_BTHN, v_BTHP, grads[0]))
            weights = part.weigh_(torch.matmul(q, k.mT))
            dscores = part.weigh_(torch.matmul(dy, v.mT))
            dv = torch.matmul(weights.mT, dy)
            dq = torch.matmul(dscores, k)
            dk = torch.matmul(dscores.mT, q)
            if dstate is not None:
                dv += torch.matmul(k * part.exit, dstate)
                dk.addcmul_(torch.matmul(v, dstate.mT), part.exit)
            if state is not None:
                dq.addcmul_(torch.matmul(dy, state.mT), part.entry)
                dread = torch.matmul((q * part.entry).mT, dy)
                dstate = dread if dstate is None else dread.addcmul_(dstate, part.carry)
            for whole, own in ((dq_BTHN, dq), (dk_BTHN, dk), (dv_BTHP, dv)):
                whole[:, part.at] = own.transpose(1, 2)
        return dq_BTHN, dk_BTHN, dv_BTHP, None, None, None, None
