"""The gated short convolution as a module. B batch · T positions · D model width · K conv width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zexp.blocks.cache import Cache, Recurrent
from zexp.blocks.context import Context
from zexp.blocks.init import Draw
from zexp.blocks.layer import BlockLayer, Place
from zexp.blocks.linear import Linear
from zexp.blocks.short_conv.spec import Spec


class Layer(BlockLayer):
    """B, C, x = in_proj(u); out_proj(C * conv(B * x))."""

    def __init__(self, spec: Spec, width: int, eps: float, place: Place):
        super().__init__()
        self.spec = spec
        self.in_proj = Linear(width, 3 * width, bias=spec.bias)
        self.conv_weight = nn.Parameter(torch.empty(width, spec.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(width)) if spec.bias else None
        self.out_proj = Linear(width, width, bias=spec.bias)

    def initialise(self, draw: Draw) -> None:
        """As the other convolutions here: LFM2's own initial weights are not published."""
        draw.linear(self.in_proj)
        draw.conv(self.conv_weight, self.conv_bias)
        draw.linear(self.out_proj, residual=True)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        b, c, x = self.in_proj(x_BTD).chunk(3, dim=-1)
        y = self.kernels.causal_conv1d(b * x, self.conv_weight, self.conv_bias, context.documents, silu=False)
        return self.out_proj(c * y)

    def new_cache(self, batch: int, like: Tensor) -> Cache:
        return Recurrent(conv=like.new_zeros(batch, *self.conv_weight.t().shape))

    @torch.no_grad()
    def decode(self, x_BTD: Tensor, cache: Cache | None, context: Context) -> Tensor:
        assert isinstance(cache, Recurrent)
        b, c, x = self.in_proj(x_BTD).chunk(3, dim=-1)
        y, cache["conv"] = self.kernels.causal_conv1d_continue(b * x, self.conv_weight, self.conv_bias, cache["conv"], silu=False)
        return self.out_proj(c * y)
