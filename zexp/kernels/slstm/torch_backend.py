"""The sLSTM cell: one loop over positions, of few operations on all rows, heads and gates, with a hand-written gradient.

B batch · T positions · H heads · P head width · G the four gates, in the order f, o, i, z.

h_t goes into the gates of t + 1 through R, so positions cannot be computed in parallel. The published cell keeps c, n and a
stabiliser m (arXiv:2405.04517, eq. 15 to 17); only y = c / n is read. With l = log n the same cell is
    u = log f + l',    l = log(e^u + e^i),    g = sigmoid(i - u),    y = y' + g (tanh z - y'),    h = sigmoid(o) y,
where ' is the position before: g = i / n is what the new value weighs. All is finite whatever the gates are (l is -inf
before the first position, where u = -inf and g = 1), and nine operations make a step.

Backwards, with what y, l and h receive (dy, dl, dh):
    dz = dy g (1 - tanh(z)^2),   di = dy (tanh z - y') g (1 - g) + dl g,   du = dl - di,   df = du sigmoid(-f),
    dl' = du,   dy' = dy (1 - g),   do = dh y o (1 - o),
whose factors are taken for all positions at once, so that seven operations make a step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zexp.kernels.documents import Documents
from zexp.kernels.precision import at_least_fp32

FORGET, OUTPUT, INPUT, CELL = range(4)


def slstm(inputs_BTHGP: Tensor, recurrent_HPGP: Tensor, documents: Documents | None = None) -> Tensor:
    """h, (B, T, H, P), in the inputs' dtype; arithmetic in fp32 at least.

    h_t = sigmoid(o_t) c_t / n_t with c_t = f_t c_{t-1} + i_t tanh(z_t) and n_t = f_t n_{t-1} + i_t, where f is a sigmoid and i an
    exponential of its gate, and a position's gates are inputs_t + h_{t-1} R, each head for itself.
    documents: all memory is zero before every document.
    Source: xLSTM (arXiv:2405.04517), eq. (8) to (18).
    """
    with torch.autocast(inputs_BTHGP.device.type, enabled=False):
        inputs, recurrent = at_least_fp32(inputs_BTHGP), at_least_fp32(recurrent_HPGP)
        ids = None if documents is None else documents.ids_BT
        return _Slstm.apply(inputs, recurrent, ids).to(inputs_BTHGP.dtype)


class State(NamedTuple):
    """What the cell remembers: h, y and l; zeros, zeros and -inf before the first position."""

    hidden_BHP: Tensor
    value_BHP: Tensor
    log_normaliser_BHP: Tensor


@torch.no_grad()
def slstm_continue(inputs_BTHGP: Tensor, recurrent_HPGP: Tensor, state: State) -> tuple[Tensor, State]:
    """The same from a state, and the state after the last position. state: fp32 at least. No gradient."""
    with torch.autocast(inputs_BTHGP.device.type, enabled=False):
        inputs, recurrent = at_least_fp32(inputs_BTHGP), at_least_fp32(recurrent_HPGP)
        hidden, value, log_normaliser = (tensor.transpose(0, 1) for tensor in state)
        run = _run(inputs, recurrent, None, hidden, value, log_normaliser)
        last = (run.hiddens_HTBP[:, -1], run.values_HTBP[:, -1], run.log_normaliser_HBP)
        h_BTHP = run.hiddens_HTBP.permute(2, 1, 0, 3).to(inputs_BTHGP.dtype)
        return h_BTHP, State(*(tensor.transpose(0, 1).contiguous() for tensor in last))


class _Run(NamedTuple):
    gates_HTBGP: Tensor  # -f, sigmoid(o), g and tanh(z)
    values_HTBP: Tensor
    hiddens_HTBP: Tensor
    log_normaliser_HBP: Tensor  # the last


def _kept(ids_BT: Tensor | None, like: Tensor) -> dict[int, Tensor]:
    """For each position where some row's document starts, but the first: 1 for the rows that go on, 0 for those, (B, 1)."""
    if ids_BT is None:
        return {}
    kept_TB = (ids_BT[:, 1:] == ids_BT[:, :-1]).t()
    positions = (~kept_TB).any(1).nonzero().flatten().tolist()
    return {position + 1: kept_TB[position, :, None].to(like.dtype) for position in positions}


def _run(
    inputs_BTHGP: Tensor,
    recurrent_HPGP: Tensor,
    ids_BT: Tensor | None,
    hidden_HBP: Tensor,
    value_HBP: Tensor,
    log_normaliser_HBP: Tensor,
) -> _Run:
    # f enters with its sign turned: log f = -log(1 + e^-f).
    gates = inputs_BTHGP.permute(2, 1, 0, 3, 4).clone(memory_format=torch.contiguous_format)
    gates[..., FORGET, :].neg_()
    recurrent = recurrent_HPGP.clone()
    recurrent[:, :, FORGET].neg_()
    recurrent = recurrent.flatten(2)
    values, hiddens = (torch.empty_like(gates[..., 0, :], memory_format=torch.contiguous_format) for _ in range(2))
    kept = _kept(ids_BT, gates)
    zero = gates.new_zeros(())
    log_n, log_u = log_normaliser_HBP.clone(memory_format=torch.contiguous_format), torch.empty_like(values[:, 0])
    negated_f = torch.empty_like(log_u)
    steps = zip(
        gates.flatten(3).unbind(1),
        *(gates[..., gate, :].unbind(1) for gate in (FORGET, OUTPUT, INPUT, CELL)),
        gates[..., OUTPUT : INPUT + 1, :].unbind(1),
        values.unbind(1),
        hiddens.unbind(1),
        strict=True,
    )
    for position, (all_gates, f, o, i, z, o_and_i, value, hidden) in enumerate(steps):
        if position in kept:
            hidden_HBP = hidden_HBP * kept[position]
            log_n = torch.where(kept[position] > 0, log_n, -torch.inf)
        torch.baddbmm(all_gates, hidden_HBP, recurrent, out=all_gates)
        torch.logaddexp(f, zero, out=negated_f)
        torch.sub(log_n, negated_f, out=log_u)
        torch.logaddexp(log_u, i, out=log_n)
        i.sub_(log_u)
        o_and_i.sigmoid_()
        z.tanh_()
        torch.lerp(value_HBP, z, i, out=value)
        torch.mul(o, value, out=hidden)
        value_HBP, hidden_HBP = value, hidden
    return _Run(gates, values, hiddens, log_n)


class _Slstm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs_BTHGP: Tensor, recurrent_HPGP: Tensor, ids_BT: Tensor | None) -> Tensor:
        zeros = inputs_BTHGP.new_zeros(inputs_BTHGP.shape[2], inputs_BTHGP.shape[0], inputs_BTHGP.shape[4])
        run = _run(inputs_BTHGP, recurrent_HPGP, ids_BT, zeros, zeros, torch.full_like(zeros, -torch.inf))
        ctx.save_for_backward(recurrent_HPGP, ids_BT, run.gates_HTBGP, run.values_HTBP, run.hiddens_HTBP)
        return run.hiddens_HTBP.permute(2, 1, 0, 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recurrent_HPGP, ids_BT, gates, values, hiddens = ctx.saved_tensors
        heads, length, batch, width = values.shape
        _, o, g, z = gates.unbind(3)
        # What the gates receive, and a fifth row for what y' does: first the factors, which the loop multiplies in place.
        received = gates.new_empty(heads, length, batch, 5, width)
        torch.sigmoid(gates[..., FORGET, :], out=received[..., FORGET, :])
        torch.addcmul(o, o, o, value=-1, out=received[..., OUTPUT, :]).mul_(values)
        before = torch.cat((torch.zeros_like(values[:, :1]), values[:, :-1]), dim=1)
        kept_share = torch.sub(1, g, out=received[..., 4, :])
        torch.sub(z, before, out=received[..., INPUT, :]).mul_(g).mul_(kept_share)
        torch.addcmul(g, g, z * z, value=-1, out=received[..., CELL, :])

        kept = _kept(ids_BT, gates)
        into_gates = recurrent_HPGP.flatten(2).mT.contiguous()
        dlog_n = values.new_zeros(heads, batch, width)
        dhidden_ahead = values.new_zeros(heads, batch, 4 * width)
        dvalue_ahead = values.new_zeros(heads, batch, width)
        steps = zip(
            grads[0].permute(2, 1, 0, 3).contiguous().unbind(1),
            o.unbind(1),
            g.unbind(1),
            received.flatten(3)[..., : 4 * width].unbind(1),
            received[..., INPUT:, :].unbind(1),
            *(received[..., row, :].unbind(1) for row in (FORGET, OUTPUT, INPUT, 4)),
            strict=True,
        )
        for position, (dh, o_t, g_t, all_gates, of_value, f, output, i, dvalue_before) in reversed(
            list(enumerate(steps))
        ):
            dhidden = torch.baddbmm(dh, dhidden_ahead, into_gates)
            dvalue = torch.addcmul(dvalue_ahead, dhidden, o_t)
            of_value.mul_(dvalue[:, :, None])
            output.mul_(dhidden)
            i.addcmul_(dlog_n, g_t)
            dlog_n.sub_(i)
            f.mul_(dlog_n)
            # At a document's start g is 1, so that dy' and du are 0; only h is to be cut off.
            dhidden_ahead = all_gates * kept[position] if position in kept else all_gates
            dvalue_ahead = dvalue_before

        entered = hiddens[:, :-1]
        if kept:
            entered = entered.clone()
            for position, going_on in kept.items():
                entered[:, position - 1] *= going_on
        drecurrent = torch.bmm(
            entered.reshape(heads, -1, width).mT, received.view(heads, -1, 5 * width)[:, batch:, : 4 * width]
        )
        dinputs_BTHGP = received[..., :4, :].permute(2, 1, 0, 3, 4)
        return dinputs_BTHGP, drecurrent.view(recurrent_HPGP.shape), None
