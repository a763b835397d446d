"""Activations of MLPs; the gated units have a hand-written gradient that fills one array for gate and up."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from zexp.kernels.activation.names import GATED, Activation, Gate


def mlp_activation(x: Tensor, name: Activation) -> Tensor:
    """A gated unit: act(gate) * up, where gate and up are the first and second half of the last dimension of x.
    A plain function: act(x). In x's dtype.
    """
    if name in GATED:
        return _Gated.apply(x, GATED[name])
    return _act(x, cast(Gate, name))


def gated(x: Tensor, gate: Gate) -> Tensor:
    """gate(first half of x) * (second half of x)."""
    return _Gated.apply(x, gate)


def mlp_activation_and_gradient(x: Tensor, dout: Tensor, name: Activation) -> tuple[Tensor, Tensor]:
    """mlp_activation(x, name) and the gradient of x that follows from its gradient dout, for hand-written backward
    passes that keep x alone.
    """
    if name not in GATED:
        plain = cast(Gate, name)
        return _act(x, plain), _act_backward(dout, x, plain)
    gate, up = x.chunk(2, dim=-1)
    acted = _act(gate, GATED[name])
    return acted * up, _gated_backward(dout, x, acted, GATED[name])


def _act(x: Tensor, name: Gate) -> Tensor:
    if name == "silu":
        return F.silu(x)
    if name == "gelu_erf":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return F.relu(x) if name == "relu" else F.relu(x).square()


def _act_backward(dout: Tensor, x: Tensor, name: Gate) -> Tensor:
    if name == "silu":
        return torch.ops.aten.silu_backward(dout, x)
    if name in ("gelu_erf", "gelu_tanh"):
        return torch.ops.aten.gelu_backward(dout, x, approximate="tanh" if name == "gelu_tanh" else "none")
    return dout * (x > 0) if name == "relu" else dout * F.relu(x).mul_(2)


def _gated_backward(dout: Tensor, x: Tensor, acted: Tensor, name: Gate) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    dx = torch.empty_like(x)
    dgate, dup = dx.chunk(2, dim=-1)
    torch.mul(dout, acted, out=dup)
    dgate.copy_(_act_backward(dout * up, gate, name))
    return dx


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: Gate) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        acted = _act(gate, name)
        ctx.save_for_backward(x, acted)
        ctx.name = name
        return acted * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, acted = ctx.saved_tensors
        return _gated_backward(grads[0], x, acted, ctx.name), None
