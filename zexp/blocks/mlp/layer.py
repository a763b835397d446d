"""The dense MLP as a module. B batch · T positions · D model width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zexp.blocks.cache import Cache, Recurrent
from zexp.blocks.context import Context
from zexp.blocks.init import Draw
from zexp.blocks.layer import BlockLayer, Place
from zexp.blocks.linear import Linear
from zexp.blocks.mlp.spec import Spec
from zexp.kernels.token_shift.torch_backend import token_shift, token_shift_continue


class Layer(BlockLayer):
    """down(act(up(x))); of a gated activation `up` holds the gate's rows first, then up's.

    With a token shift x is mixed with the position before it first, which a decoding cache holds.
    """

    def __init__(self, spec: Spec, width: int, eps: float, place: Place):
        super().__init__()
        self.activation, self.place = spec.activation, place
        self.mix = nn.Parameter(torch.empty(1, width)) if spec.token_shift else None
        self.up = Linear(width, spec.width * (2 if spec.gated else 1), bias=spec.bias)
        self.down = Linear(spec.width, width, bias=spec.bias)

    def initialise(self, draw: Draw) -> None:
        """A token shift and what follows it start as in RWKV-LM (BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py, x070): the
        first layers mix most, all of them channels of a low number more, and nothing is written at first.
        """
        draw.linear(self.up)
        draw.linear(self.down, residual=True)
        if self.mix is not None:
            width = self.mix.shape[1]
            remaining = 1 - self.place.index / self.place.count
            with torch.no_grad():
                self.mix[0] = 1 - (torch.arange(width) / width) ** remaining**4
            draw.uniform(self.up.weight, -0.5 * width**-0.5, 0.5 * width**-0.5)
            draw.constant(self.down.weight, 0.0)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        if self.mix is not None:
            (x_BTD,) = token_shift(x_BTD, self.mix, context.documents)
        return self._mlp(x_BTD)

    def new_cache(self, batch: int, like: Tensor) -> Cache | None:
        return None if self.mix is None else Recurrent(shift=like.new_zeros(batch, self.mix.shape[1]))

    @torch.no_grad()
    def decode(self, x_BTD: Tensor, cache: Cache | None, context: Context) -> Tensor:
        if self.mix is not None:
            assert isinstance(cache, Recurrent)
            (x_BTD,), cache["shift"] = token_shift_continue(x_BTD, self.mix, cache["shift"])
        return self._mlp(x_BTD)

    def _mlp(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.kernels.mlp_activation(self.up(x_BTD), self.activation))
