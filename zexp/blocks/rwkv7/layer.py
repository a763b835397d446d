"""RWKV-7's time mix as a module. B batch · T positions · D model width · H heads · N head width · R narrow width."""

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
from zexp.blocks.rwkv7.spec import Spec
from zexp.kernels.precision import at_least_fp32
from zexp.kernels.rwkv7_keys.torch_backend import rwkv7_keys
from zexp.kernels.rwkv7_out.torch_backend import rwkv7_out
from zexp.kernels.token_shift.torch_backend import token_shift, token_shift_continue
from zexp.kernels.wkv7.torch_backend import log_decay, wkv7_continue

FIRST_VALUES = "rwkv7.first_values"  # the note that the first layer leaves: its values, (B, T, D)
NORM_EPS = 1e-5  # times N: the heads' norm (64e-5 in the published models)

_Scanned = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

# How strongly r, w, k, v, a, g are mixed with the position before: 1 - (d / D)^(power · remaining depth).
MIX_POWERS = (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)


class _Narrow(nn.Module):
    """up(between(down(x))), plus a bias in fp32. Not of nn.Linear: as published, weight decay leaves these matrices alone."""

    def __init__(self, width: int, rank: int, bias: bool = True):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, width))
        self.up = nn.Parameter(torch.empty(width, rank))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def initialise(self, draw: Draw, bias_D: Tensor | None) -> None:
        width, rank = self.up.shape
        draw.constant(self.down, 0.0)
        nn.init.orthogonal_(self.up, gain=0.1 * math.sqrt(max(1.0, rank / width)), generator=draw.generator)
        if self.bias is not None and bias_D is not None:
            _set(self.bias, bias_D)

    def forward(self, x_BTD: Tensor, between: str | None = None) -> Tensor:
        narrow_BTR = F.linear(x_BTD, self.down)
        if between is not None:
            narrow_BTR = narrow_BTR.tanh() if between == "tanh" else narrow_BTR.sigmoid()
        out_BTD = F.linear(narrow_BTR, self.up)
        return out_BTD if self.bias is None else at_least_fp32(out_BTD) + self.bias


class Layer(BlockLayer):
    """output(rwkv7_out(wkv7(r, w, k', v', kappa, a), …, g)), where each of r, w, k, v, a, g is a linear map or a narrow pair
    of its own mix of x_t and x_{t-1}; k', kappa = rwkv7_keys(k, a); v' = v + (v of the first layer - v) · sigmoid(…).
    """

    def __init__(self, spec: Spec, width: int, eps: float, place: Place):
        super().__init__()
        self.spec, self.place = spec, place
        heads, rank = (spec.heads(width), spec.head_dim), spec.lora_rank
        self.mix = nn.Parameter(torch.empty(len(MIX_POWERS), width))
        self.receptance = Linear(width, width, bias=False)
        self.key = Linear(width, width, bias=False)
        self.value = Linear(width, width, bias=False)
        self.output = Linear(width, width, bias=False)
        self.decay = _Narrow(width, rank.decay)
        self.rate = _Narrow(width, rank.rate)
        self.residual = None if place.index == 0 else _Narrow(width, rank.value)
        self.gate = _Narrow(width, rank.gate, bias=False)
        self.k_k = nn.Parameter(torch.empty(heads))
        self.k_a = nn.Parameter(torch.empty(heads))
        self.r_k = nn.Parameter(torch.empty(heads))
        self.norm_weight = nn.Parameter(torch.empty(heads))
        self.norm_bias = nn.Parameter(torch.empty(heads))

    def initialise(self, draw: Draw) -> None:
        """As in RWKV-LM (BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py, x070), with the layers of this block for its
        layers: where it writes nothing at first, this writes nothing.
        """
        width, heads = self.mix.shape[1], self.k_k.shape
        channel = torch.arange(width)
        ramp = channel / max(width - 1, 1)  # 0 .. 1 over the channels
        linear = ramp - 0.5
        zigzag = (channel % heads[1]) * 2 / max(heads[1] - 1, 1) - 1  # -1 .. 1 over the channels of each head
        zigzag = zigzag * zigzag.abs()
        remaining = 1 - self.place.index / self.place.count
        _set(self.mix, 1 - (channel / width) ** (torch.tensor(MIX_POWERS)[:, None] * remaining))
        speeds = -6 + 6 * ramp ** (1 + self.place.depth**0.3)
        self.decay.initialise(draw, speeds + 0.5 + 2.5 * zigzag)
        self.rate.initialise(draw, -0.19 + 0.3 * zigzag + 0.4 * linear)
        if self.residual is not None:
            self.residual.initialise(draw, 0.73 - 0.4 * linear)
        self.gate.initialise(draw, None)
        _set(self.k_k, (0.71 - 0.1 * linear).view(heads))
        draw.constant(self.k_a, 1.02)
        draw.constant(self.r_k, -0.04)
        draw.constant(self.norm_weight, 1.0)
        draw.constant(self.norm_bias, 0.0)
        bound = 0.5 * width**-0.5
        draw.uniform(self.receptance.weight, -bound, bound)
        draw.uniform(self.key.weight, -0.1 * bound, 0.1 * bound)
        draw.uniform(self.value.weight, -bound, bound)
        draw.constant(self.output.weight, 0.0)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        scanned, g_BTHN = self._scanned(token_shift(x_BTD, self.mix, context.documents), context)
        return self._out(self.kernels.wkv7(*scanned, documents=context.documents), scanned, g_BTHN)

    def new_cache(self, batch: int, like: Tensor) -> Cache:
        heads, size = self.k_k.shape
        return Recurrent(
            shift=like.new_zeros(batch, heads * size), state=at_least_fp32(like.new_zeros(batch, heads, size, size))
        )

    @torch.no_grad()
    def decode(self, x_BTD: Tensor, cache: Cache | None, context: Context) -> Tensor:
        assert isinstance(cache, Recurrent)
        shifted, cache["shift"] = token_shift_continue(x_BTD, self.mix, cache["shift"])
        scanned, g_BTHN = self._scanned(shifted, context)
        y_BTHN, cache["state"] = wkv7_continue(*scanned, cache["state"])
        return self._out(y_BTHN, scanned, g_BTHN)

    def _scanned(self, shifted: tuple[Tensor, ...], context: Context) -> tuple[_Scanned, Tensor]:
        """r, w, k', v', kappa, a as the scan takes them, and the gate; each (B, T, H, N)."""
        for_r, for_w, for_k, for_v, for_a, for_g = shifted
        w = log_decay(self.decay(for_w, "tanh"))
        a = self.rate(for_a).sigmoid()
        v = self.value(for_v)
        if self.residual is None:
            context.notes[FIRST_VALUES] = v
        else:
            v = v + (context.notes[FIRST_VALUES] - v) * self.residual(for_v).sigmoid()
        r, w, k, v, a, g = (
            tensor.unflatten(-1, self.k_k.shape)
            for tensor in (self.receptance(for_r), w, self.key(for_k), v, a, self.gate(for_g, "sigmoid"))
        )
        written, removal = rwkv7_keys(k, a, self.k_k, self.k_a)
        return (r, w, written, v, removal, a), g

    def _out(self, y_BTHN: Tensor, scanned: _Scanned, g_BTHN: Tensor) -> Tensor:
        r, _, k, v, _, _ = scanned
        eps = NORM_EPS * self.spec.head_dim
        out = rwkv7_out(y_BTHN, r, k, v, g_BTHN, self.r_k, self.norm_weight, self.norm_bias, eps)
        return self.output(out.flatten(2))


@torch.no_grad()
def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)
