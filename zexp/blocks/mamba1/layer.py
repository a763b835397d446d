"""Mamba1 as a module.

B batch · T positions · D model width · I inner width · H heads · P channels of a head · N state size · K conv width ·
R rank of dt · S what a head selects by: R + 2N.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zexp.blocks.cache import Cache, Recurrent
from zexp.blocks.context import Context
from zexp.blocks.init import Draw
from zexp.blocks.layer import BlockLayer, Place
from zexp.blocks.linear import Linear
from zexp.blocks.mamba1.spec import Spec
from zexp.blocks.norm import RmsNorm
from zexp.kernels.precision import at_least_fp32
from zexp.kernels.selective_scan.torch_backend import selective_scan_continue


class Layer(BlockLayer):
    """x, z = in_proj(u); x = silu(conv(x)); dt, B, C = x_proj(x); dt = softplus(dt_proj(dt) + dt_bias);
    y = selective_scan(x, dt, -exp(A_log), B, C) + D x; out_proj(y * silu(z)).
    """

    DECAYED: ClassVar[tuple[str, ...]] = ("x_proj", "dt_proj")

    def __init__(self, spec: Spec, width: int, eps: float, place: Place):
        super().__init__()
        self.spec = spec
        inner, rank, size, heads = spec.inner(width), spec.rank(width), spec.state_size, spec.heads
        self.splits = (rank, size, size)
        self.in_proj = Linear(width, 2 * inner, bias=spec.bias)
        self.conv_weight = nn.Parameter(torch.empty(inner, spec.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(inner)) if spec.conv_bias else None
        self.x_proj = nn.Parameter(torch.empty(heads, sum(self.splits), inner // heads))
        self.norms = nn.ModuleList(RmsNorm(part, eps) for part in self.splits) if spec.inner_norms else None
        self.dt_proj = nn.Parameter(torch.empty(heads, inner // heads, rank))
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.empty(inner, size))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = Linear(inner, width, bias=spec.bias)

    def initialise(self, draw: Draw) -> None:
        draw.linear(self.in_proj)
        draw.conv(self.conv_weight, self.conv_bias)
        draw.normal(self.x_proj)
        for norm in self.norms or ():
            norm.initialise(draw)  # type: ignore[operator]
        bound = self.splits[0] ** -0.5
        draw.uniform(self.dt_proj, -bound, bound)
        draw.dt_bias(self.dt_bias)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.spec.state_size + 1).log().expand_as(self.A_log))
        draw.constant(self.D, 1.0)
        draw.linear(self.out_proj, residual=True)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        x_BTI, z_BTI = self.in_proj(x_BTD).chunk(2, dim=-1)
        x_BTI = self.kernels.causal_conv1d(x_BTI, self.conv_weight, self.conv_bias, context.documents)
        dt_BTI, b_BTHN, c_BTHN = self._selected(x_BTI)
        inputs = (x_BTI, dt_BTI, self._rates(), b_BTHN, c_BTHN, self.D, self.dt_bias, z_BTI)
        return self.out_proj(self.kernels.selective_scan(*inputs, documents=context.documents))

    def new_cache(self, batch: int, like: Tensor) -> Cache:
        inner, size = self.A_log.shape
        heads = self.spec.heads
        return Recurrent(
            conv=like.new_zeros(batch, self.spec.conv_width, inner),
            state=at_least_fp32(like.new_zeros(batch, heads, size, inner // heads)),
        )

    @torch.no_grad()
    def decode(self, x_BTD: Tensor, cache: Cache | None, context: Context) -> Tensor:
        assert isinstance(cache, Recurrent)
        x_BTI, z_BTI = self.in_proj(x_BTD).chunk(2, dim=-1)
        x_BTI, cache["conv"] = self.kernels.causal_conv1d_continue(x_BTI, self.conv_weight, self.conv_bias, cache["conv"])
        dt_BTI, b_BTHN, c_BTHN = self._selected(x_BTI)
        dt_BTI = F.softplus(at_least_fp32(dt_BTI) + self.dt_bias)
        y_BTI, cache["state"] = selective_scan_continue(
            x_BTI, dt_BTI, self._rates(), b_BTHN, c_BTHN, self.D, cache["state"]
        )
        return self.out_proj(y_BTI * F.silu(z_BTI))

    def _rates(self) -> Tensor:
        """A, (I, N)."""
        return -at_least_fp32(self.A_log).exp()

    def _selected(self, x_BTI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt before its bias and softplus (B, T, I), B and C (B, T, H, N)."""
        parts = zip(x_BTI.chunk(self.spec.heads, dim=-1), self.x_proj, strict=True)
        selected = [F.linear(part, weight) for part, weight in parts]
        selected_BTHS = selected[0][:, :, None] if len(selected) == 1 else torch.stack(selected, dim=2)
        low, b, c = selected_BTHS.split(self.splits, dim=-1)
        if self.norms is not None:
            low, b, c = (norm(part) for norm, part in zip(self.norms, (low, b, c), strict=True))
        steps = [F.linear(part, weight) for part, weight in zip(low.unbind(2), self.dt_proj, strict=True)]
        return steps[0] if len(steps) == 1 else torch.cat(steps, dim=-1), b, c
