"""The KAN channel mixer as a module. B batch · T positions · D model width · F hidden width · J bases."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from zexp.blocks.context import Context
from zexp.blocks.init import Draw
from zexp.blocks.kan.spec import Spec
from zexp.blocks.layer import BlockLayer, Place
from zexp.kernels.bspline.torch_backend import kan_linear

SPLINE_STD = 0.1  # of an output's whole spline part, in units of a basis


class Layer(BlockLayer):
    """down(up(x)), both Kolmogorov-Arnold layers. Rows of a matrix: the base weights, then the coefficients of B_0, B_1, …,
    those of all inputs each time.
    """

    DECAYED: ClassVar[tuple[str, ...]] = ("up", "down")

    def __init__(self, spec: Spec, width: int, eps: float, place: Place):
        super().__init__()
        self.spec = spec
        self.up = nn.Parameter(torch.empty(spec.width, spec.planes * width))
        self.down = nn.Parameter(torch.empty(width, spec.planes * spec.width))

    def initialise(self, draw: Draw) -> None:
        """Base weights as Glorot & Bengio's, splines near zero (KAN, arXiv:2404.19756, section 2.2).

        The paper draws coefficients with a deviation of 0.1 an edge, in networks a few edges wide; here 0.1 is what the
        edges of an output make together. Both parts of `down` are scaled as all that writes to the residual stream.
        """
        self._draw(draw, self.up, 1.0)
        self._draw(draw, self.down, draw.writes**-0.5)

    def _draw(self, draw: Draw, weight: Tensor, scale: float) -> None:
        outputs, inputs = weight.shape[0], weight.shape[1] // self.spec.planes
        draw.normal(weight[:, :inputs], scale * math.sqrt(2 / (inputs + outputs)))
        draw.normal(weight[:, inputs:], scale * SPLINE_STD * inputs**-0.5)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        return self._layer(self._layer(x_BTD, self.up), self.down)

    def _layer(self, x: Tensor, weight: Tensor) -> Tensor:
        spec = self.spec
        return kan_linear(x, weight, order=spec.order, grid=spec.grid, half_range=spec.range, base=spec.base)
