"""Activations, written as their formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zexp.kernels.activation.names import GATED, Activation, Gate


def activate(x: Tensor, name: Gate) -> Tensor:
    """The function of that name; gelu_tanh is Hendrycks & Gimpel's approximation (arXiv:1606.08415)."""
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "gelu_erf":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "relu":
        return x.clamp(min=0)
    return x.clamp(min=0) ** 2


def mlp_activation(x: Tensor, name: Activation) -> Tensor:
    """A gated unit reads (gate, up) from the halves of the last dimension; the others act elementwise."""
    return gated(x, GATED[name]) if name in GATED else activate(x, name)  # type: ignore[arg-type]


def gated(x: Tensor, gate: Gate) -> Tensor:
    """gate(first half of x) * (second half of x)."""
    first, second = x.chunk(2, dim=-1)
    return activate(first, gate) * second
