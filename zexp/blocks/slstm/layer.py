"""sLSTM as a module. B batch · T positions · D model width · H heads · P head width · G gates · K conv width."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from zexp.blocks.cache import Cache, Recurrent
from zexp.blocks.context import Context
from zexp.blocks.init import Draw
from zexp.blocks.layer import BlockLayer, Place
from zexp.blocks.slstm.spec import Spec
from zexp.kernels.head_norm.torch_backend import head_norm
from zexp.kernels.precision import at_least_fp32
from zexp.kernels.slstm.torch_backend import FORGET, State, slstm, slstm_continue


class Layer(BlockLayer):
    """f, i = W silu(conv(x)); o, z = W x; h = slstm((f, o, i, z) + bias, R); layer norm of each head(h).

    Nothing is projected out: the normed memory itself is added to the stream.
    """

    DECAYED: ClassVar[tuple[str, ...]] = ("filtered_weight", "direct_weight", "recurrent_weight")

    def __init__(self, spec: Spec, width: int, eps: float, place: Place):
        super().__init__()
        self.spec, self.eps, self.place = spec, eps, place
        heads, head = spec.heads, width // spec.heads
        if spec.conv_width is not None:
            self.conv_weight = nn.Parameter(torch.empty(width, spec.conv_width))
            self.conv_bias = nn.Parameter(torch.empty(width))
        self.filtered_weight = nn.Parameter(torch.empty(heads, head, 2, head))  # to f and i
        self.direct_weight = nn.Parameter(torch.empty(heads, head, 2, head))  # to o and z
        self.recurrent_weight = nn.Parameter(torch.empty(heads, head, 4, head))
        self.bias = nn.Parameter(torch.empty(heads, 4, head))
        self.norm_weight = nn.Parameter(torch.empty(heads, head))

    def initialise(self, draw: Draw) -> None:
        """As NX-AI/xlstm: "small" input matrices, no recurrence, forget biases from 5 to -7 by a power law within each head,
        steep at first in the first layer and later in the last, so that heads remember for different times.
        """
        heads, head = self.norm_weight.shape
        if self.spec.conv_width is not None:
            draw.conv(self.conv_weight, self.conv_bias)
        for weight in (self.filtered_weight, self.direct_weight):
            draw.normal(weight, math.sqrt(2 / (5 * heads * head)))
        draw.constant(self.recurrent_weight, 0.0)
        draw.constant(self.bias, 0.0)
        with torch.no_grad():
            channel_P = torch.arange(head) / max(head - 1, 1)
            self.bias[:, FORGET] = 5.0 - 12.0 * channel_P ** (0.3 + 1.3 * self.place.depth)
        draw.constant(self.norm_weight, 1.0)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        filtered_BTD = x_BTD
        if self.spec.conv_width is not None:
            filtered_BTD = self.kernels.causal_conv1d(x_BTD, self.conv_weight, self.conv_bias, context.documents)
        return self._out(slstm(self._gates(x_BTD, filtered_BTD), self.recurrent_weight, context.documents))

    def new_cache(self, batch: int, like: Tensor) -> Cache:
        heads, head = self.norm_weight.shape
        zeros = at_least_fp32(like.new_zeros(batch, heads, head))
        tensors = {"hidden": zeros, "value": zeros, "log_normaliser": torch.full_like(zeros, -torch.inf)}
        if self.spec.conv_width is not None:
            tensors["conv"] = like.new_zeros(batch, self.spec.conv_width, heads * head)
        return Recurrent(**tensors)

    @torch.no_grad()
    def decode(self, x_BTD: Tensor, cache: Cache | None, context: Context) -> Tensor:
        assert isinstance(cache, Recurrent)
        filtered_BTD = x_BTD
        if self.spec.conv_width is not None:
            filtered_BTD, cache["conv"] = self.kernels.causal_conv1d_continue(x_BTD, self.conv_weight, self.conv_bias, cache["conv"])
        before = State(cache["hidden"], cache["value"], cache["log_normaliser"])
        h, state = slstm_continue(self._gates(x_BTD, filtered_BTD), self.recurrent_weight, before)
        cache["hidden"], cache["value"], cache["log_normaliser"] = state
        return self._out(h)

    def _gates(self, x_BTD: Tensor, filtered_BTD: Tensor) -> Tensor:
        """What the input gives the gates, (B, T, H, G, P), f, o, i, z."""
        heads, head = self.norm_weight.shape

        def product(values_BTD: Tensor, weight_HPGP: Tensor) -> Tensor:
            values_HMP = values_BTD.flatten(0, 1).unflatten(-1, (heads, head)).transpose(0, 1)
            return torch.matmul(values_HMP, weight_HPGP.flatten(2)).unflatten(-1, (2, head))

        pairs = product(filtered_BTD, self.filtered_weight), product(x_BTD, self.direct_weight)
        gates_HMGP = torch.stack(pairs, dim=3).flatten(2, 3) + self.bias[:, None]
        return gates_HMGP.unflatten(1, x_BTD.shape[:2]).permute(1, 2, 0, 3, 4)

    def _out(self, h_BTHP: Tensor) -> Tensor:
        return head_norm(h_BTHP, self.norm_weight, self.eps, centred=True)
