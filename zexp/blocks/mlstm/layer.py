"""mLSTM as a module.

B batch · T positions · D model width · H heads · N key width · P value width · I all heads' values (H·P).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zexp.blocks.cache import Cache, Recurrent
from zexp.blocks.context import Context
from zexp.blocks.init import Draw
from zexp.blocks.layer import BlockLayer, Place
from zexp.blocks.linear import Linear
from zexp.blocks.mlstm.spec import Spec
from zexp.kernels.head_norm.torch_backend import head_norm
from zexp.kernels.mlstm.torch_backend import Inputs, State, mlstm, mlstm_continue
from zexp.kernels.precision import at_least_fp32

NORMALISER_EPS = 1e-6  # xLSTM-7B's
FORGET_BIASES = (3.0, 6.0)  # of the first and the last head at the start (arXiv:2405.04517, appendix)


class Layer(BlockLayer):
    """q, k, v, o = in_proj(x); i, f = softcap(gates(x)); h = mlstm(q, k, v, i, log sigmoid(f));
    out_proj(layer norm of each head(h) * sigmoid(o)).
    """

    def __init__(self, spec: Spec, width: int, eps: float, place: Place):
        super().__init__()
        self.spec, self.eps, self.width = spec, eps, width
        keys, values = spec.keys(width), spec.values(width)
        self.splits = (keys, keys, values, values)
        self.cell = {"scale": (keys // spec.heads) ** -0.5, "eps": NORMALISER_EPS, "chunk": spec.chunk}
        self.in_proj = Linear(width, sum(self.splits), bias=False)
        self.gates = Linear(width, 2 * spec.heads, bias=True)
        self.norm_weight = nn.Parameter(torch.empty(spec.heads, values // spec.heads))
        self.out_proj = Linear(values, width, bias=False)

    def initialise(self, draw: Draw) -> None:
        """As NX-AI/xlstm: "small" matrices in (std sqrt(2 / 5D)), Wang's out (2 / blocks / sqrt(D)), gates open by biases
        alone. A block of theirs is two branches of the stream, the cell and an MLP.
        """
        draw.normal(self.in_proj.weight, math.sqrt(2 / (5 * self.width)))
        draw.constant(self.gates.weight, 0.0)
        draw.constant(self.gates.bias, self.spec.input_bias)
        with torch.no_grad():
            self.gates.bias[self.spec.heads :] = torch.linspace(*FORGET_BIASES, self.spec.heads)
        draw.constant(self.norm_weight, 1.0)
        blocks = max(draw.writes / 2, 1)
        draw.normal(self.out_proj.weight, 2 / blocks / math.sqrt(self.width))

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        inputs, gate = self._projections(x_BTD)
        return self._out(mlstm(*inputs, documents=context.documents, **self.cell), gate)

    def new_cache(self, batch: int, like: Tensor) -> Cache:
        heads, (keys, _, values, _) = self.spec.heads, self.splits
        zeros = at_least_fp32(like.new_zeros(())).new_zeros
        return Recurrent(
            memory=zeros(batch, heads, keys // heads, values // heads),
            normaliser=zeros(batch, heads, keys // heads),
            m=zeros(batch, heads),
        )

    @torch.no_grad()
    def decode(self, x_BTD: Tensor, cache: Cache | None, context: Context) -> Tensor:
        assert isinstance(cache, Recurrent)
        inputs, gate = self._projections(x_BTD)
        before = State(cache["memory"], cache["normaliser"], cache["m"])
        h, state = mlstm_continue(*inputs, before, **self.cell)
        cache["memory"], cache["normaliser"], cache["m"] = state
        return self._out(h, gate)

    def _projections(self, x_BTD: Tensor) -> tuple[Inputs, Tensor]:
        """q, k (B, T, H, N), v (B, T, H, P), the logarithms of the input and forget gates (B, T, H); o (B, T, I)."""
        *parts, gate = self.in_proj(x_BTD).split(self.splits, dim=-1)
        q, k, v = (part.unflatten(-1, (self.spec.heads, -1)) for part in parts)
        gates, cap = at_least_fp32(self.gates(x_BTD)), self.spec.gate_softcap
        input_BTH, forget_BTH = (gates if cap is None else cap * torch.tanh(gates / cap)).chunk(2, dim=-1)
        return (q, k, v, input_BTH, F.logsigmoid(forget_BTH)), gate

    def _out(self, h_BTHP: Tensor, gate_BTI: Tensor) -> Tensor:
        normed = head_norm(h_BTHP, self.norm_weight, self.eps, centred=True, gate_BTI=gate_BTI, activation="sigmoid")
        return self.out_proj(normed)
