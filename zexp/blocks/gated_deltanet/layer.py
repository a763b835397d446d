"""Gated DeltaNet as a module.

B batch · T positions · D model width · G key heads · N key width · H value heads · P value width · I all values (H·P)
C channels of queries, keys and values together · K conv width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zexp.blocks.cache import Cache, Recurrent
from zexp.blocks.context import Context
from zexp.blocks.gated_deltanet.spec import Spec
from zexp.blocks.init import Draw
from zexp.blocks.layer import BlockLayer, Place
from zexp.blocks.linear import Linear
from zexp.kernels.gated_delta.torch_backend import gated_delta_continue
from zexp.kernels.head_norm.torch_backend import head_norm
from zexp.kernels.precision import at_least_fp32

# Initial range of the paper's code (NVlabs/GatedDeltaNet, which takes them from Mamba-2).
DECAY_RANGE = (0.01, 16.0)  # of exp(A_log), uniform; not from 0, whose log is no weight (transformers' Qwen3-Next)


class Layer(BlockLayer):
    """qkv, z, a, b = in_proj(x); q, k, v = silu(conv(qkv)); y = gated_delta(q, k, v, -exp(A_log) softplus(a + dt_bias),
    sigmoid(b)); out_proj(norm(y) * silu(z)).
    """

    def __init__(self, spec: Spec, width: int, eps: float, place: Place):
        super().__init__()
        self.spec, self.eps = spec, eps
        groups, keys, heads, values = spec.sizes(width)
        self.heads = (groups, groups, heads)
        self.state_shape = (groups, keys, heads // groups * values)
        self.splits = spec.splits(width)
        self.qkv_splits = (groups * keys, groups * keys, heads * values)
        self.in_proj = Linear(width, sum(self.splits), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.splits[0], spec.conv_width))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.norm_weight = nn.Parameter(torch.empty(values))
        self.out_proj = Linear(heads * values, width, bias=False)

    def initialise(self, draw: Draw) -> None:
        draw.linear(self.in_proj)
        draw.conv(self.conv_weight, None)
        draw.dt_bias(self.dt_bias)
        draw.uniform(self.A_log, *DECAY_RANGE)
        with torch.no_grad():
            self.A_log.log_()
        draw.constant(self.norm_weight, 1.0)
        draw.linear(self.out_proj, residual=True)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        qkv_BTC, z_BTI, a_BTH, b_BTH = self.in_proj(x_BTD).split(self.splits, dim=-1)
        qkv_BTC = self.kernels.causal_conv1d(qkv_BTC, self.conv_weight, None, context.documents)
        inputs = self._mixed(qkv_BTC, a_BTH, b_BTH)
        y_BTHP = self.kernels.gated_delta(*inputs, chunk=self.spec.chunk, documents=context.documents)
        return self._out(y_BTHP, z_BTI)

    def new_cache(self, batch: int, like: Tensor) -> Cache:
        return Recurrent(
            conv=like.new_zeros(batch, self.spec.conv_width, self.splits[0]),
            state=at_least_fp32(like.new_zeros(batch, *self.state_shape)),
        )

    @torch.no_grad()
    def decode(self, x_BTD: Tensor, cache: Cache | None, context: Context) -> Tensor:
        assert isinstance(cache, Recurrent)
        qkv_BTC, z_BTI, a_BTH, b_BTH = self.in_proj(x_BTD).split(self.splits, dim=-1)
        qkv_BTC, cache["conv"] = self.kernels.causal_conv1d_continue(qkv_BTC, self.conv_weight, None, cache["conv"])
        inputs = self._mixed(qkv_BTC, a_BTH, b_BTH)
        y_BTHP, cache["state"] = gated_delta_continue(*inputs, cache["state"], chunk=self.spec.chunk)
        return self._out(y_BTHP, z_BTI)

    def _mixed(self, qkv_BTC: Tensor, a_BTH: Tensor, b_BTH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, the log-decay and beta as the delta rule takes them."""
        parts = zip(qkv_BTC.split(self.qkv_splits, dim=-1), self.heads, strict=True)
        q, k, v = (part.unflatten(-1, (heads, -1)) for part, heads in parts)
        g = -at_least_fp32(self.A_log).exp() * F.softplus(at_least_fp32(a_BTH) + self.dt_bias)
        beta = at_least_fp32(b_BTH).sigmoid()
        return q, k, v, g, beta * 2 if self.spec.negative_eigenvalues else beta

    def _out(self, y_BTHP: Tensor, z_BTI: Tensor) -> Tensor:
        gate = z_BTI if self.spec.output_gate else None
        return self.out_proj(head_norm(y_BTHP, self.norm_weight, self.eps, gate_BTI=gate))
