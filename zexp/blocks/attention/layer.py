"""Causal attention as a module. B batch · T positions · D model width · H query heads · G key-value heads · P head width."""

from __future__ import annotations

from torch import Tensor, nn

from zexp.blocks.attention.spec import Spec
from zexp.blocks.init import Draw
from zexp.blocks.norm import RmsNorm
from zexp.kernels.attention.torch_backend import attention
from zexp.kernels.documents import Documents
from zexp.kernels.rotary.torch_backend import rotary


class Layer(nn.Module):
    """Self-attention of a normed input; queries, keys and values come from one matrix, in that order."""

    def __init__(self, spec: Spec, width: int, eps: float):
        super().__init__()
        assert spec.kv_heads is not None and spec.head_dim is not None, "the spec must be completed"
        self.spec = spec
        self.splits = (spec.heads, spec.kv_heads, spec.kv_heads)
        self.qkv = nn.Linear(width, sum(self.splits) * spec.head_dim, bias=spec.bias)
        self.out = nn.Linear(spec.heads * spec.head_dim, width, bias=spec.bias)
        self.q_norm = RmsNorm(spec.head_dim, eps) if spec.qk_norm else None
        self.k_norm = RmsNorm(spec.head_dim, eps) if spec.qk_norm else None

    def initialise(self, draw: Draw) -> None:
        draw.linear(self.qkv)
        draw.linear(self.out, residual=True)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.initialise(draw)

    def forward(self, x_BTD: Tensor, documents: Documents | None) -> Tensor:
        head_dim = self.spec.head_dim
        assert head_dim is not None
        q, k, v = self.qkv(x_BTD).unflatten(-1, (-1, head_dim)).split(self.splits, dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.rope_theta is not None:
            q, k = rotary(q, self.spec.rope_theta), rotary(k, self.spec.rope_theta)
        mixed_BTHP = attention(q, k, v, scale=head_dim**-0.5, documents=documents)
        return self.out(mixed_BTHP.flatten(2))
