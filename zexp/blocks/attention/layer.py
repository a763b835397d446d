"""Causal attention as a module.

B batch · T positions · D model width · H query heads · G key-value heads · P head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zexp.blocks.attention.spec import Spec
from zexp.blocks.cache import Cache, KeyValues
from zexp.blocks.context import Context
from zexp.blocks.init import Draw
from zexp.blocks.layer import BlockLayer, Place
from zexp.blocks.linear import Linear
from zexp.blocks.norm import RmsNorm


class Layer(BlockLayer):
    """Self-attention of a normed input; queries, keys, values and gates come from one matrix, in that order."""

    def __init__(self, spec: Spec, width: int, eps: float, place: Place):
        super().__init__()
        assert spec.kv_heads is not None and spec.head_dim is not None, "the spec must be completed"
        self.spec, self.head_dim = spec, spec.head_dim
        self.turned, self.scale = spec.turned(width), spec.scale(width)
        self.splits = (spec.heads, spec.kv_heads, spec.kv_heads, spec.heads if spec.output_gate else 0)
        self.qkv = Linear(width, sum(self.splits) * spec.head_dim, bias=spec.bias or spec.qkv_bias)
        self.out = Linear(spec.heads * spec.head_dim, width, bias=spec.bias)
        self.q_norm = RmsNorm(spec.head_dim, eps) if spec.qk_norm else None
        self.k_norm = RmsNorm(spec.head_dim, eps) if spec.qk_norm else None

    def initialise(self, draw: Draw) -> None:
        draw.linear(self.qkv)
        draw.linear(self.out, residual=True)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.initialise(draw)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        q, k, v, gate = self._projections(x_BTD, start=0)
        if self.spec.rope_theta is not None and not self.spec.qk_norm:
            v = v.contiguous()  # as a view it would keep the unturned q and k for the backward pass
        mixed = self.kernels.attention(q, k, v, scale=self.scale, window=self.spec.seen, documents=context.documents)
        return self._out(mixed, gate)

    def new_cache(self, batch: int, like: Tensor) -> Cache:
        return KeyValues(self.spec.seen)

    @torch.no_grad()
    def decode(self, x_BTD: Tensor, cache: Cache | None, context: Context) -> Tensor:
        assert isinstance(cache, KeyValues)
        q, k, v, gate = self._projections(x_BTD, start=cache.seen)
        keys, values = cache.append(k, v)
        return self._out(self.kernels.attention_continue(q, keys, values, scale=self.scale, window=self.spec.seen), gate)

    def _projections(self, x_BTD: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and what becomes the gate, (B, T, heads, P) each."""
        q, k, v, gate = self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim)).split(self.splits, dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        theta, scaling = self.spec.rope_theta, self.spec.rope_scaling
        if theta is not None:
            q = self.kernels.rotary(q, theta, turned=self.turned, start=start, scaling=scaling)
            k = self.kernels.rotary(k, theta, turned=self.turned, start=start, scaling=scaling)
        return q, k, v, gate

    def _out(self, mixed_BTHP: Tensor, gate: Tensor) -> Tensor:
        return self.out((mixed_BTHP * gate.sigmoid() if self.spec.output_gate else mixed_BTHP).flatten(2))
