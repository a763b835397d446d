"""State-space duality in chunks, as matrix products, with a hand-written gradient.

B batch · T positions · H heads · P head width · G groups · N state size · Q chunk · M chunks of all rows (B T / Q)
J heads of a group (H / G).

Within a chunk the layer is attention with a decay instead of a softmax; between chunks a state of N × P a head is carried
(Mamba-2, arXiv:2405.21060, section 6). Five choices keep it fast without a compiler:
- arrays of Q × Q a head are made for some chunks at a time, in buffers that stay in the cache, and never kept: the
  backward pass makes the decays again (writing them to fresh memory costs more than computing them);
- a chunk's decays are products of a row and a column factor around the start of each block of 16 rows, so that three
  quarters of the exponentials (1 ns each, ten times a product) are not taken;
- states are built and read for all heads of a group in one product of inner size J·P; the per-head decays are put on x;
- decays are exponentials of differences, at most 1, so nothing overflows; the causal mask sits on C·B^T, which has G
  matrices a chunk where the decays have H;
- the gradient with respect to the summed log-decays needs no Q × Q array: position i reads with weight exp(cum_i), so
  it receives <dy_i, y_i>; position j writes with exp(-cum_j), so it receives -<dx_j, x_j>; the end of a chunk receives
  <d state, state>.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zexp.kernels.chunks import ChunkMasks, chunk_masks
from zexp.kernels.documents import Documents
from zexp.kernels.precision import at_least_fp32
from zexp.kernels.running_sum import running_sum

BUFFER_ELEMENTS = 1 << 18  # of a Q × Q buffer: 1 MB in fp32; smaller ones pay more in calls than they save in cache
DECAY_BLOCK = 16


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
    """The selective state space of Mamba-2, (B, T, H, P), in x's dtype; arithmetic in fp32 at least, under autocast too.

    S_t = exp(dt_t a) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + d x_t. dt is positive, a negative. G divides H.
    chunk: Q, any; rows are padded to whole chunks. documents: the state is zero before every document.
    """
    length = x_BTHP.shape[1]
    size = min(chunk, length)
    padding = -length % size
    inputs = [at_least_fp32(tensor) for tensor in (x_BTHP, dt_BTH, b_BTGN, c_BTGN)]
    if padding:  # dt = 0 neither decays nor writes; the padded rows are cut off
        inputs = [F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, padding)) for tensor in inputs]
    x, dt, b, c = inputs
    with torch.autocast(x.device.type, enabled=False):  # the backward pass knows none: dtypes would not fit together
        y = _Ssd.apply(x, dt, a_H, b, c, d_H, size, documents)
    return (y[:, :length] if padding else y).to(x_BTHP.dtype)


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
    """The same from a state, and the state after the last position: (B, T, H, P) and (B, G, N, J·P). No gradient.

    state_BGNJ: fp32 at least, with J·P = the channels of a group's heads. One position takes the recurrence itself.
    """
    length, dtype = x_BTHP.shape[1], x_BTHP.dtype
    inputs = [at_least_fp32(tensor) for tensor in (x_BTHP, dt_BTH, b_BTGN, c_BTGN)]
    if length == 1:
        x, dt, b, c = (tensor[:, 0] for tensor in inputs)
        decay_BGJ = _per_channel((dt * a_H).exp(), state_BGNJ)
        written_BGJ = (x * dt[..., None]).view(decay_BGJ.shape)
        state = torch.addcmul(state_BGNJ * decay_BGJ[:, :, None], b[..., None], written_BGJ[:, :, None])
        y = torch.matmul(c[:, :, None], state).view(x.shape).addcmul(x, d_H[:, None])
        return y[:, None].to(dtype), state
    size = min(chunk, length)
    padding = -length % size
    if padding:
        inputs = [F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, padding)) for tensor in inputs]
    x, dt, b, c = inputs
    with torch.autocast(x.device.type, enabled=False):
        scan = _scan(x, dt, a_H, b, c, d_H, size, initial=state_BGNJ)
    last = _per_channel(scan.carry_BCH[:, -1], state_BGNJ)[:, :, None]
    state = torch.addcmul(scan.leaving[:, -1], scan.entering[:, -1], last)
    return scan.y_BTHP[:, :length].to(dtype), state


def _per_channel(values_BH: Tensor, state_BGNJ: Tensor) -> Tensor:
    """A number a head, (B, H), repeated to (B, G, J·P)."""
    groups, channels = state_BGNJ.shape[1], state_BGNJ.shape[3]
    return values_BH.unflatten(1, (groups, -1)).repeat_interleave(channels * groups // values_BH.shape[1], dim=2)


class _Scan(NamedTuple):
    """What the forward pass computes and the backward pass reads again."""

    y_BTHP: Tensor
    cum_MQH: Tensor
    entry_MQH: Tensor
    exit_MQH: Tensor
    carry_BCH: Tensor
    leaving: Tensor  # (B, C, G, N, JP): what each chunk adds to the state
    entering: Tensor  # (B, C, G, N, JP): the state at each chunk's start
    scores_MGQQ: Tensor


def _scan(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    d_H: Tensor,
    chunk: int,
    masks: ChunkMasks | None = None,
    initial: Tensor | None = None,
) -> _Scan:
    """T is a multiple of chunk. initial: the state (B, G, N, JP) before the first position, None = zero."""
    batch, length, heads, width = x_BTHP.shape
    groups = b_BTGN.shape[2]
    chunks = length // chunk
    x_MQHP, dt_MQH, b_MQGN, c_MQGN = (
        tensor.reshape(batch * chunks, chunk, *tensor.shape[2:]) for tensor in (x_BTHP, dt_BTH, b_BTGN, c_BTGN)
    )
    cum_MQH = running_sum(dt_MQH * a_H, 1)
    entry_MQH = cum_MQH.exp()
    exit_MQH = (cum_MQH[:, -1:] - cum_MQH).exp_()
    carry_BCH = entry_MQH[:, -1].unflatten(0, (batch, chunks))
    if masks is not None:
        entry_MQH = entry_MQH * masks.entry_BCQ.flatten(0, 1)[..., None]
        exit_MQH = exit_MQH * masks.exit_BCQ.flatten(0, 1)[..., None]
        carry_BCH = carry_BCH * masks.carry_BC[..., None]

    written_MQHP = x_MQHP * dt_MQH[..., None]
    leaving = torch.matmul(_by_group(b_MQGN).mT, _heads_by_group(written_MQHP * exit_MQH[..., None], groups))
    leaving = leaving.unflatten(0, (batch, chunks))
    entering = _carry(leaving, carry_BCH, initial)
    read = torch.matmul(_by_group(c_MQGN), entering.flatten(0, 1))  # (M, G, Q, JP)

    scores_MGQQ = torch.matmul(_by_group(c_MQGN), _by_group(b_MQGN).mT).tril_()
    if masks is not None:
        scores_MGQQ *= masks.pair_BCQQ.flatten(0, 1)[:, None]
    y_MQHP = _from_groups(read, heads).mul_(entry_MQH[..., None])
    _read_inside(y_MQHP, cum_MQH, scores_MGQQ, written_MQHP)
    y_MQHP.addcmul_(x_MQHP, d_H[:, None])
    return _Scan(
        y_MQHP.view(batch, length, heads, width),
        cum_MQH,
        entry_MQH,
        exit_MQH,
        carry_BCH,
        leaving,
        entering,
        scores_MGQQ,
    )


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
        masks = None if documents is None else chunk_masks(documents, chunk, x_BTHP.dtype)
        scan = _scan(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, d_H, chunk, masks)
        ctx.save_for_backward(
            x_BTHP,
            dt_BTH,
            a_H,
            b_BTGN,
            c_BTGN,
            d_H,
            scan.cum_MQH,
            scan.entry_MQH,
            scan.exit_MQH,
            scan.carry_BCH,
            scan.entering,
            scan.scores_MGQQ,
            scan.y_BTHP,
        )
        ctx.masks = masks  # not this layer's own: nothing is kept for them
        return scan.y_BTHP

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (
            x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, d_H, cum_MQH, entry_MQH, exit_MQH, carry_BCH, entering, scores_MGQQ,
            y_BTHP,
        ) = ctx.saved_tensors  # fmt: skip
        heads, groups = x_BTHP.shape[2], b_BTGN.shape[2]
        count, chunk = entry_MQH.shape[:2]
        x, dt, b, c, y, dy = (
            tensor.reshape(count, chunk, *tensor.shape[2:])
            for tensor in (x_BTHP, dt_BTH, b_BTGN, c_BTGN, y_BTHP, grads[0])
        )
        b_MGQN, c_MGQN = _by_group(b), _by_group(c)
        written = x * dt[..., None]

        # Through the states.
        dread = _heads_by_group(dy * entry_MQH[..., None], groups)  # (M, G, Q, JP)
        dc_MGQN = torch.matmul(dread, entering.flatten(0, 1).mT)
        dentering = torch.matmul(c_MGQN.mT, dread).view_as(entering)
        dleaving, dend_BCH = _carry_backward(dentering, carry_BCH, entering)
        dleaving_MGNJ = dleaving.flatten(0, 1)
        dwritten = _from_groups(torch.matmul(b_MGQN, dleaving_MGNJ), heads).mul_(exit_MQH[..., None])
        db_MGQN = torch.matmul(_heads_by_group(written * exit_MQH[..., None], groups), dleaving_MGNJ.mT)

        # Within the chunks.
        dscores = _read_inside_backward(dwritten, dy, cum_MQH, scores_MGQQ, written).tril_()
        if ctx.masks is not None:
            dscores *= ctx.masks.pair_BCQQ.flatten(0, 1)[:, None]
        dc_MGQN += torch.matmul(dscores, b_MGQN)
        db_MGQN += torch.matmul(dscores.mT, c_MGQN)

        # To the inputs.
        dwritten_x = (dwritten * x).sum(-1)
        dy_x = (dy * x).sum(-1)
        dcum = (dy * y).sum(-1) - dy_x * d_H - dwritten_x * dt
        dcum[:, -1] += dend_BCH.flatten(0, 1)
        dlog = running_sum(dcum, 1, reverse=True)
        dx = dwritten.mul_(dt[..., None]).addcmul_(dy, d_H[:, None])
        ddt = dwritten_x + dlog * a_H
        return (
            dx.view(x_BTHP.shape),
            ddt.view(dt_BTH.shape),
            (dlog * dt).sum((0, 1)),
            db_MGQN.transpose(1, 2).reshape(b_BTGN.shape),
            dc_MGQN.transpose(1, 2).reshape(c_BTGN.shape),
            dy_x.sum((0, 1)),
            None,
            None,
        )


def _by_group(tensor_MQGN: Tensor) -> Tensor:
    return tensor_MQGN.transpose(1, 2)


def _heads_by_group(tensor_MQHP: Tensor, groups: int) -> Tensor:
    """(M, Q, H, P) to (M, G, Q, J·P)."""
    return tensor_MQHP.unflatten(2, (groups, -1)).flatten(3).transpose(1, 2)


def _from_groups(tensor: Tensor, heads: int) -> Tensor:
    """(M, G, Q, J·P) to a contiguous (M, Q, H, P)."""
    groups = tensor.shape[1]
    return tensor.transpose(1, 2).unflatten(3, (heads // groups, -1)).flatten(2, 3).contiguous()


class _Buffers:
    """Room for the Q × Q arrays and the heads of a few chunks at a time."""

    def __init__(self, written_MQHP: Tensor, arrays: int):
        count, chunk, heads, width = written_MQHP.shape
        chunks = max(1, min(count, BUFFER_ELEMENTS // (heads * chunk * chunk)))
        self.parts = [slice(start, min(start + chunks, count)) for start in range(0, count, chunks)]
        self.squares = [written_MQHP.new_empty(chunks, heads, chunk, chunk) for _ in range(arrays)]
        self.rows = [written_MQHP.new_empty(chunks, heads, chunk, width) for _ in range(2)]


def _bmm(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Products of the last two dimensions into `out`, all flattened to one batch dimension."""
    torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out=out.flatten(0, 1))
    return out


def _read_inside(y_MQHP: Tensor, cum_MQH: Tensor, scores_MGQQ: Tensor, written_MQHP: Tensor) -> None:
    """Adds to y what each position reads from its own chunk."""
    cum_MHQ = cum_MQH.transpose(1, 2).contiguous()
    buffers = _Buffers(written_MQHP, arrays=1)
    for part in buffers.parts:
        count = part.stop - part.start
        weights = _fill_decays(buffers.squares[0][:count], cum_MHQ[part])
        _times_scores(weights, scores_MGQQ[part], out=weights)
        heads = buffers.rows[0][:count].copy_(written_MQHP[part].transpose(1, 2))
        y_MQHP[part] += _bmm(weights, heads, out=buffers.rows[1][:count]).transpose(1, 2)


def _read_inside_backward(
    dwritten_MQHP: Tensor, dy_MQHP: Tensor, cum_MQH: Tensor, scores_MGQQ: Tensor, written_MQHP: Tensor
) -> Tensor:
    """Adds to dwritten, and returns the gradient of the scores above and below the diagonal."""
    cum_MHQ = cum_MQH.transpose(1, 2).contiguous()
    dscores_MGQQ = torch.empty_like(scores_MGQQ)
    groups = scores_MGQQ.shape[1]
    buffers = _Buffers(written_MQHP, arrays=2)
    for part in buffers.parts:
        count = part.stop - part.start
        decays, square = (buffer[:count] for buffer in buffers.squares)
        dy_heads, rows = (buffer[:count] for buffer in buffers.rows)
        _fill_decays(decays, cum_MHQ[part])
        dy_heads.copy_(dy_MQHP[part].transpose(1, 2))
        rows.copy_(written_MQHP[part].transpose(1, 2))
        _bmm(dy_heads, rows.mT, out=square).mul_(decays)
        torch.sum(square.unflatten(1, (groups, -1)), 2, out=dscores_MGQQ[part])
        _times_scores(decays, scores_MGQQ[part], out=decays)
        dwritten_MQHP[part] += _bmm(decays.mT, dy_heads, out=rows).transpose(1, 2)
    return dscores_MGQQ


def _fill_decays(out_MHQQ: Tensor, cum_MHQ: Tensor) -> Tensor:
    """exp(cum_i - cum_j) for i >= j; above the diagonal anything from 0 to 1.

    For row block r with first position f: exp(cum_i - cum_j) = exp(cum_i - cum_f) exp(cum_f - cum_j) if j <= f, where
    both factors are at most 1; the blocks on the diagonal are taken directly.
    """
    chunk = cum_MHQ.shape[-1]
    if chunk % DECAY_BLOCK or chunk == DECAY_BLOCK:
        return torch.sub(cum_MHQ[..., :, None], cum_MHQ[..., None, :], out=out_MHQQ).clamp_(max=0).exp_()
    blocks = chunk // DECAY_BLOCK
    cum_MHRS = cum_MHQ.unflatten(-1, (blocks, DECAY_BLOCK))
    first_MHR1 = cum_MHRS[..., :1]
    rows_MHRS = (cum_MHRS - first_MHR1).exp_()
    columns_MHRQ = (first_MHR1 - cum_MHQ[..., None, :]).clamp_(max=0).exp_()
    torch.mul(rows_MHRS[..., None], columns_MHRQ[..., None, :], out=out_MHQQ.unflatten(2, (blocks, DECAY_BLOCK)))
    diagonal = (cum_MHRS[..., :, None] - cum_MHRS[..., None, :]).clamp_(max=0).exp_()
    whole = out_MHQQ.unflatten(3, (blocks, DECAY_BLOCK)).unflatten(2, (blocks, DECAY_BLOCK))  # (M, H, R, S, R, S)
    whole.diagonal(dim1=2, dim2=4).copy_(diagonal.movedim(2, -1))
    return out_MHQQ


def _times_scores(decays_MHQQ: Tensor, scores_MGQQ: Tensor, out: Tensor) -> Tensor:
    shape = (scores_MGQQ.shape[1], -1)
    torch.mul(decays_MHQQ.unflatten(1, shape), scores_MGQQ[:, :, None], out=out.unflatten(1, shape))
    return out


def _wide(carry_BCH: Tensor, like: Tensor) -> Tensor:
    """(B, C, H) repeated to (B, C, G, 1, J·P) of a state."""
    groups, inner = like.shape[2], like.shape[4]
    heads = carry_BCH.shape[2]
    return carry_BCH.unflatten(2, (groups, -1)).repeat_interleave(inner * groups // heads, dim=3)[:, :, :, None]


def _carry(leaving: Tensor, carry_BCH: Tensor, initial: Tensor | None = None) -> Tensor:
    """The state that enters each chunk, from what each chunk adds: (B, C, G, N, J·P)."""
    wide = _wide(carry_BCH, leaving)
    entering = torch.empty_like(leaving)
    entering[:, 0] = 0 if initial is None else initial
    for n in range(1, leaving.shape[1]):
        torch.addcmul(leaving[:, n - 1], entering[:, n - 1], wide[:, n - 1], out=entering[:, n])
    return entering


def _carry_backward(dentering: Tensor, carry_BCH: Tensor, entering: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what each chunk adds, and of the summed log-decay at each chunk's end (B, C, H)."""
    wide = _wide(carry_BCH, entering)
    dleaving = torch.empty_like(dentering)
    dleaving[:, -1] = 0
    for n in range(dentering.shape[1] - 1, 0, -1):
        torch.addcmul(dentering[:, n], dleaving[:, n], wide[:, n], out=dleaving[:, n - 1])
    dend = torch.zeros_like(carry_BCH)
    heads = carry_BCH.shape[2]
    touched = (dleaving[:, :-1] * entering[:, 1:]).sum(3)  # (B, C - 1, G, J·P)
    dend[:, :-1] = touched.flatten(2).unflatten(2, (heads, -1)).sum(-1)
    return dleaving, dend
