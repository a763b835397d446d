"""The Zamba shared transformer block as modules: the shared weights, and what each call has to itself.

B batch · T positions · D model width · E input width · H heads · P head width · F MLP width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zexp.blocks.cache import KeyValues
from zexp.blocks.context import Context
from zexp.blocks.init import Draw
from zexp.blocks.linear import Linear
from zexp.blocks.norm import RmsNorm
from zexp.blocks.shared.spec import Spec
from zexp.kernels.dispatch import TORCH, Kernels


class Adapter(nn.Module):
    """LoRA without an alpha: up(down(x)). It starts at zero, so that every call starts with the shared weights."""

    def __init__(self, entered: int, rank: int, left: int):
        super().__init__()
        self.down = Linear(entered, rank, bias=False)
        self.up = Linear(rank, left, bias=False)

    def initialise(self, draw: Draw) -> None:
        draw.linear(self.down)
        draw.constant(self.up.weight, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class Call(nn.Module):
    """The weights of one call: adapters of rank R and a linear map of the block's output, each if the spec has it."""

    def __init__(self, spec: Spec, width: int, eps: float):
        super().__init__()
        entered, rank = spec.input_width(width), spec.lora_rank
        self.qkv = (
            nn.ModuleList(Adapter(entered, rank.attention, entered) for _ in range(3)) if rank.attention else None
        )
        self.mlp = Adapter(width, rank.mlp, 2 * spec.mlp_width) if rank.mlp else None
        self.linear = Linear(width, width, bias=False) if spec.call_linear else None

    def initialise(self, draw: Draw) -> None:
        for adapter in self.qkv or ():
            adapter.initialise(draw)  # type: ignore[operator]
        if self.mlp is not None:
            self.mlp.initialise(draw)
        if self.linear is not None:
            draw.linear(self.linear)


class Shared(nn.Module):
    """One copy of the shared weights: attention over concat(hidden, embeddings), then a gated MLP.

    There is no residual inside the block; the scale of the scores is that of a head of D / H channels
    (Zamba2, arXiv:2411.15242; `transformers` modeling_zamba2).
    """

    kernels: Kernels = TORCH

    def __init__(self, spec: Spec, width: int, eps: float):
        super().__init__()
        self.spec = spec
        entered = spec.input_width(width)
        self.head_dim = entered // spec.heads
        self.scale = (width / spec.heads) ** -0.5
        self.input_norm = RmsNorm(entered, eps)
        self.qkv = Linear(entered, 3 * entered, bias=False)
        self.out = Linear(entered, width, bias=False)
        self.mlp_norm = RmsNorm(width, eps)
        self.up = Linear(width, 2 * spec.mlp_width, bias=False)
        self.down = Linear(spec.mlp_width, width, bias=False)

    def initialise(self, draw: Draw) -> None:
        self.input_norm.initialise(draw)
        self.mlp_norm.initialise(draw)
        for linear in (self.qkv, self.out, self.up, self.down):
            draw.linear(linear)

    def forward(self, hidden_BTD: Tensor, embedded_BTD: Tensor, call: Call, context: Context) -> Tensor:
        """What is added to the input of the layer that the block feeds, (B, T, D)."""
        q, k, v = self._projections(hidden_BTD, embedded_BTD, call, start=0)
        if self.spec.rope_theta is not None:
            v = v.contiguous()  # as a view it would keep the unturned q and k for the backward pass
        mixed = self.kernels.attention(q, k, v, scale=self.scale, documents=context.documents)
        return self._out(mixed, call)

    def new_cache(self) -> KeyValues:
        """The memory of one call; every call has its own."""
        return KeyValues()

    @torch.no_grad()
    def decode(self, hidden_BTD: Tensor, embedded_BTD: Tensor, call: Call, cache: KeyValues) -> Tensor:
        """The same for the next T positions after those that the call's cache has seen."""
        q, k, v = self._projections(hidden_BTD, embedded_BTD, call, start=cache.seen)
        keys, values = cache.append(k, v)
        return self._out(self.kernels.attention_continue(q, keys, values, scale=self.scale), call)

    def _projections(
        self, hidden_BTD: Tensor, embedded_BTD: Tensor, call: Call, start: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, (B, T, H, P) each."""
        x_BTE = torch.cat((hidden_BTD, embedded_BTD), dim=-1) if self.spec.concat_embeddings else hidden_BTD
        x_BTE = self.input_norm(x_BTE)
        qkv = self.qkv(x_BTE)
        if call.qkv is not None:
            qkv = qkv + torch.cat([adapter(x_BTE) for adapter in call.qkv], dim=-1)
        q, k, v = qkv.unflatten(-1, (3 * self.spec.heads, -1)).split(self.spec.heads, dim=2)
        if self.spec.rope_theta is not None:
            q, k = (self.kernels.rotary(x, self.spec.rope_theta, start=start) for x in (q, k))
        return q, k, v

    def _out(self, mixed_BTHP: Tensor, call: Call) -> Tensor:
        y_BTD = self.mlp_norm(self.out(mixed_BTHP.flatten(2)))
        up = self.up(y_BTD)
        if call.mlp is not None:
            up = up + call.mlp(y_BTD)
        out_BTD = self.down(self.kernels.gated(up, self.spec.activation))
        return out_BTD if call.linear is None else call.linear(out_BTD)
