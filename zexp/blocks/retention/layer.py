"""Retention as a module.

B batch · T positions · D model width · H heads · N key width · P value width · I all heads' values (H·P).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zexp.blocks.cache import Cache, Recurrent
from zexp.blocks.context import Context
from zexp.blocks.init import Draw
from zexp.blocks.layer import BlockLayer, Place
from zexp.blocks.linear import Linear
from zexp.blocks.retention.spec import Spec
from zexp.kernels.head_norm.torch_backend import head_norm
from zexp.kernels.precision import at_least_fp32
from zexp.kernels.retention.torch_backend import retention_continue

IN_GAIN = 2.0**-2.5  # of Xavier's range, for the matrices that read the stream (microsoft/torchscale, RetNet)


class State(Recurrent):
    """The states of all heads, and how many positions they have seen: where the next rotary angle starts."""

    def __init__(self, state_BHNP: Tensor):
        super().__init__(state=state_BHNP)
        self.seen = 0


class Layer(BlockLayer):
    """q, k, v, g = in_proj(x); y = retention(rotary(q), rotary(k), v); out_proj(norm(y) * silu(g))."""

    def __init__(self, spec: Spec, width: int, eps: float, place: Place):
        super().__init__()
        inner = spec.values(width)
        self.spec, self.eps = spec, eps
        self.splits = (width, width, inner, inner if spec.gate else 0)
        self.retains = {"scale": (width // spec.heads) ** -0.5, "chunk": spec.chunk}
        self.in_proj = Linear(width, sum(self.splits), bias=False)
        self.norm_weight = nn.Parameter(torch.empty(inner // spec.heads))
        self.out_proj = Linear(inner, width, bias=False)

    def initialise(self, draw: Draw) -> None:
        width = self.splits[0]
        for rows in self.in_proj.weight.detach().split(self.splits):
            bound = IN_GAIN * (6 / (width + rows.shape[0])) ** 0.5 if len(rows) else 0.0
            draw.uniform(rows, -bound, bound)  # type: ignore[arg-type]
        draw.constant(self.norm_weight, 1.0)
        draw.linear(self.out_proj, residual=True)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        q, k, v, gate = self._projections(x_BTD, start=0)
        mixed = self.kernels.retention(q, k, v, self.spec.log_decays, documents=context.documents, **self.retains)
        return self._out(mixed, gate)

    def new_cache(self, batch: int, like: Tensor) -> Cache:
        heads, (width, _, inner, _) = self.spec.heads, self.splits
        return State(at_least_fp32(like.new_zeros(batch, heads, width // heads, inner // heads)))

    @torch.no_grad()
    def decode(self, x_BTD: Tensor, cache: Cache | None, context: Context) -> Tensor:
        assert isinstance(cache, State)
        q, k, v, gate = self._projections(x_BTD, start=cache.seen)
        y, cache["state"] = retention_continue(q, k, v, self.spec.log_decays, cache["state"], **self.retains)
        cache.seen += x_BTD.shape[1]
        return self._out(y, gate)

    def _projections(self, x_BTD: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k (B, T, H, N), v (B, T, H, P) and what becomes the gate (B, T, I)."""
        *parts, gate = self.in_proj(x_BTD).split(self.splits, dim=-1)
        q, k, v = (part.unflatten(-1, (self.spec.heads, -1)) for part in parts)
        theta = self.spec.rope_theta
        if theta is not None:
            q, k = (self.kernels.rotary(x, theta, start=start) for x in (q, k))
        return q, k, v, gate

    def _out(self, y_BTHP: Tensor, gate_BTI: Tensor) -> Tensor:
        gate = gate_BTI if self.spec.gate else None
        return self.out_proj(head_norm(y_BTHP, self.norm_weight, self.eps, gate_BTI=gate))
