"""The dense MLP as a module."""

from __future__ import annotations

from torch import Tensor, nn

from zexp.blocks.context import Context
from zexp.blocks.init import Draw
from zexp.blocks.layer import BlockLayer, Place
from zexp.blocks.mlp.spec import Spec
from zexp.kernels.activation.torch_backend import mlp_activation


class Layer(BlockLayer):
    """down(act(up(x))); of a gated activation `up` holds the gate's rows first, then up's."""

    def __init__(self, spec: Spec, width: int, eps: float, place: Place):
        super().__init__()
        self.activation = spec.activation
        self.up = nn.Linear(width, spec.width * (2 if spec.gated else 1), bias=spec.bias)
        self.down = nn.Linear(spec.width, width, bias=spec.bias)

    def initialise(self, draw: Draw) -> None:
        draw.linear(self.up)
        draw.linear(self.down, residual=True)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        return self.down(mlp_activation(self.up(x_BTD), self.activation))
