"""Whole layers of retention and sLSTM against their published equations, one position at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zexp.blocks.context import Context
from zexp.blocks.layer import Place
from zexp.blocks.retention.layer import Layer as Retention
from zexp.blocks.retention.spec import Spec as RetentionSpec
from zexp.blocks.slstm.layer import Layer as Slstm
from zexp.blocks.slstm.spec import Spec as SlstmSpec
from zexp.kernels.slstm.torch_backend import CELL, FORGET, INPUT, OUTPUT

WIDTH, HEADS, LENGTH, EPS = 8, 2, 11, 1e-5


def drawn(layer: torch.nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x_BTD = torch.randn(2, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    return dict(layer.named_parameters()), x_BTD


def test_retention_is_the_sum_over_decayed_positions():
    spec = RetentionSpec(heads=HEADS, chunk=4).completed(WIDTH)
    layer = Retention(spec, WIDTH, EPS, Place(0, 1)).double()
    weights, x_BTD = drawn(layer)
    q, k, v, g = (x_BTD @ weights["in_proj.weight"].mT).split([WIDTH, WIDTH, 2 * WIDTH, 2 * WIDTH], dim=-1)
    turns = 10_000.0 ** -(torch.arange(2, dtype=torch.float64) / 2)
    angles = torch.arange(LENGTH)[:, None] * turns

    def turned(part: Tensor, head: int) -> Tensor:
        first, second = part[..., 4 * head : 4 * head + 2], part[..., 4 * head + 2 : 4 * head + 4]
        return torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)

    heads = []
    for head in range(HEADS):
        gamma, queries, keys = 1 - 2.0 ** -(5 + head), turned(q, head), turned(k, head)
        values = v[..., 8 * head : 8 * head + 8]
        out = torch.zeros_like(values)
        for t in range(LENGTH):
            for s in range(t + 1):
                weight = (queries[:, t] * keys[:, s].conj()).real.sum(-1) * gamma ** (t - s) / 4**0.5
                out[:, t] += weight[:, None] * values[:, s]
        heads.append(out / (out.square().mean(-1, keepdim=True) + EPS).sqrt() * weights["norm_weight"])
    truth = (torch.cat(heads, dim=-1) * F.silu(g)) @ weights["out_proj.weight"].mT
    torch.testing.assert_close(layer(x_BTD, Context()), truth, rtol=1e-10, atol=1e-11)


def test_slstm_filters_what_its_input_and_forget_gates_see():
    layer = Slstm(SlstmSpec(heads=HEADS), WIDTH, EPS, Place(0, 1)).double()
    weights, x_BTD = drawn(layer)
    before_BTD = F.pad(x_BTD, (0, 0, 3, 0))
    taps_DK = weights["conv_weight"]
    filtered = sum(taps_DK[:, tap] * before_BTD[:, tap : tap + LENGTH] for tap in range(4)) + weights["conv_bias"]
    filtered = F.silu(filtered)
    outputs = []
    for head in range(HEADS):
        own = slice(4 * head, 4 * head + 4)
        into = {
            FORGET: filtered[..., own] @ weights["filtered_weight"][head, :, 0],
            INPUT: filtered[..., own] @ weights["filtered_weight"][head, :, 1],
            OUTPUT: x_BTD[..., own] @ weights["direct_weight"][head, :, 0],
            CELL: x_BTD[..., own] @ weights["direct_weight"][head, :, 1],
        }
        h = c = n = x_BTD.new_zeros(2, 4)
        rows = []
        for t in range(LENGTH):
            recurrent, bias = weights["recurrent_weight"][head], weights["bias"][head]
            gate = {name: into[name][:, t] + h @ recurrent[:, name] + bias[name] for name in into}
            added, forget = gate[INPUT].exp(), gate[FORGET].sigmoid()
            c, n = forget * c + added * gate[CELL].tanh(), forget * n + added
            h = gate[OUTPUT].sigmoid() * c / n
            rows.append(h)
        outputs.append(F.layer_norm(torch.stack(rows, dim=1), (4,), weights["norm_weight"][head], eps=EPS))
    truth = torch.cat(outputs, dim=-1)
    torch.testing.assert_close(layer(x_BTD, Context()), truth, rtol=1e-10, atol=1e-11)
