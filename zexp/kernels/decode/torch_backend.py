"""What decoding calls besides the operations, as torch has it.

I inputs or inner width · O outputs · B batch · T positions · E channels of Mamba2's first product (z: I, conv: C, dt: H) · H heads
P head width · G groups · N state size · K conv width · J heads of a group (H / G).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from zexp.kernels.precision import at_least_fp32


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + bias over the last dimension, (…, O)."""
    return F.linear(x, weight_OI, bias_O)


class Mamba2Weights(NamedTuple):
    """What a layer of Mamba2 has between its two products."""

    conv_CK: Tensor
    conv_bias_C: Tensor
    dt_bias_H: Tensor
    a_log_H: Tensor  # A = -exp(a_log)
    d_H: Tensor
    norm_I: Tensor


class Mamba2Options(NamedTuple):
    eps: float  # the norm's
    chunk: int
    dt_min: float | None  # dt is clamped to, None = not
    dt_max: float | None
    norm_before_gate: bool


class Parts(Protocol):
    """The functions that it is made of, of those that a model was given."""

    @property
    def causal_conv1d_continue(self) -> Callable[..., Any]: ...
    @property
    def ssd_continue(self) -> Callable[..., Any]: ...
    @property
    def gated_norm(self) -> Callable[..., Any]: ...
    @property
    def norm_gated(self) -> Callable[..., Any]: ...


@torch.no_grad()
def mamba2_continue(
    projected_BTE: Tensor,
    weights: Mamba2Weights,
    conv_BKC: Tensor,
    state_BGNJ: Tensor,
    options: Mamba2Options,
    parts: Parts,
) -> Tensor:
    """What Mamba2 computes between its two products, (B, T, I), from what it remembers. No gradient.

    conv_BKC, state_BGNJ: the last K inputs of the convolution and the state of ssd_continue; both go on in place.
    """
    inner, groups = weights.norm_I.shape[0], state_BGNJ.shape[1]
    z_BTI, mixed_BTC, dt_BTH = projected_BTE.split((inner, conv_BKC.shape[2], weights.dt_bias_H.shape[0]), dim=-1)
    mixed_BTC, tail_BKC = parts.causal_conv1d_continue(mixed_BTC, weights.conv_CK, weights.conv_bias_C, conv_BKC)
    inputs = mamba2_scanned(mixed_BTC, dt_BTH, weights, groups, options)
    y_BTHP, after_BGNJ = parts.ssd_continue(*inputs, state_BGNJ, chunk=options.chunk)
    conv_BKC.copy_(tail_BKC)
    state_BGNJ.copy_(after_BGNJ)
    norm = parts.norm_gated if options.norm_before_gate else parts.gated_norm
    normed: Tensor = norm(y_BTHP.flatten(2), z_BTI, weights.norm_I, options.eps, groups)
    return normed


def mamba2_scanned(
    mixed_BTC: Tensor, dt_BTH: Tensor, weights: Mamba2Weights, groups: int, options: Mamba2Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, dt, A, B, C, D as the scan takes them."""
    inner, heads = weights.norm_I.shape[0], weights.dt_bias_H.shape[0]
    shared = (mixed_BTC.shape[2] - inner) // 2
    x_BTI, b, c = mixed_BTC.split((inner, shared, shared), dim=-1)
    dt = F.softplus(at_least_fp32(dt_BTH) + weights.dt_bias_H)
    if options.dt_min is not None or options.dt_max is not None:
        dt = dt.clamp(options.dt_min, options.dt_max)
    return (
        x_BTI.unflatten(-1, (heads, -1)),
        dt,
        -at_least_fp32(weights.a_log_H).exp(),
        b.unflatten(-1, (groups, -1)),
        c.unflatten(-1, (groups, -1)),
        weights.d_H,
    )
