"""Mamba2 as a module.

B batch · T positions · D model width · I inner width · H heads · P head width · G groups · N state size · K conv width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zexp.blocks.cache import Cache, Recurrent
from zexp.blocks.context import Context
from zexp.blocks.init import Draw
from zexp.blocks.layer import BlockLayer, Place
from zexp.blocks.linear import Linear
from zexp.blocks.mamba2.spec import Spec
from zexp.kernels.decode.torch_backend import Mamba2Options, Mamba2Weights, mamba2_scanned
from zexp.kernels.precision import at_least_fp32

# Initial range of the published models (state-spaces/mamba, modules/mamba2.py).
DECAY_RANGE = (1.0, 16.0)  # of -A, uniform


class Layer(BlockLayer):
    """z, xBC, dt = in_proj(u); xBC = silu(conv(xBC)); y = ssd(x, softplus(dt + dt_bias), -exp(A_log), B, C) + D x;
    out_proj(norm(y * silu(z))).
    """

    def __init__(self, spec: Spec, width: int, eps: float, place: Place):
        super().__init__()
        self.spec = spec
        self.options = Mamba2Options(eps, spec.chunk, spec.dt_min, spec.dt_max, spec.norm_before_gate)
        inner, heads, channels = spec.inner(width), spec.heads(width), spec.conv_channels(width)
        self.splits = (inner, channels, heads)
        self.in_proj = Linear(width, sum(self.splits), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(channels, spec.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm_weight = nn.Parameter(torch.empty(inner))
        self.out_proj = Linear(inner, width, bias=False)

    def initialise(self, draw: Draw) -> None:
        draw.linear(self.in_proj)
        draw.conv(self.conv_weight, self.conv_bias)
        draw.dt_bias(self.dt_bias)
        draw.uniform(self.A_log, *DECAY_RANGE)
        with torch.no_grad():
            self.A_log.log_()
        draw.constant(self.D, 1.0)
        draw.constant(self.norm_weight, 1.0)
        draw.linear(self.out_proj, residual=True)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        z_BTI, mixed_BTC, dt_BTH = self.in_proj(x_BTD).split(self.splits, dim=-1)
        mixed_BTC = self.kernels.causal_conv1d(mixed_BTC, self.conv_weight, self.conv_bias, context.documents)
        inputs = mamba2_scanned(mixed_BTC, dt_BTH, self._weights(), self.spec.groups, self.options)
        y_BTHP = self.kernels.ssd(*inputs, chunk=self.spec.chunk, documents=context.documents)
        norm = self.kernels.norm_gated if self.spec.norm_before_gate else self.kernels.gated_norm
        return self.out_proj(norm(y_BTHP.flatten(2), z_BTI, self.norm_weight, self.options.eps, self.spec.groups))

    def new_cache(self, batch: int, like: Tensor) -> Cache:
        inner, channels, _ = self.splits
        groups, state_size = self.spec.groups, self.spec.state_size
        return Recurrent(
            conv=like.new_zeros(batch, self.spec.conv_width, channels),
            state=at_least_fp32(like.new_zeros(batch, groups, state_size, inner // groups)),
        )

    @torch.no_grad()
    def decode(self, x_BTD: Tensor, cache: Cache | None, context: Context) -> Tensor:
        assert isinstance(cache, Recurrent)
        remembered = (cache["conv"], cache["state"])
        y_BTI = self.kernels.mamba2_continue(self.in_proj(x_BTD), self._weights(), *remembered, self.options, self.kernels)
        return self.out_proj(y_BTI)

    def _weights(self) -> Mamba2Weights:
        return Mamba2Weights(self.conv_weight, self.conv_bias, self.dt_bias, self.A_log, self.D, self.norm_weight)
