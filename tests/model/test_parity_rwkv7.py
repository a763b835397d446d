"""A whole RWKV-7 model against its formulas, one position after the other. `transformers` has no RWKV-7.

D model width · H heads · N head width. Names of the slow form are those of the paper (arXiv:2503.14456, section 4) and of
RWKV-LM; its weights are read from ours by name.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zexp.blocks.resolve import resolve_model
from zexp.model.build import build
from zexp.model.language_model import LanguageModel

VOCAB, WIDTH, HEAD, LENGTH = 23, 12, 4, 37  # more than a chunk
ARCH = {
    "pattern": "3*(k d)",
    "width": WIDTH,
    "tie_embeddings": False,
    "norm": {"kind": "layernorm", "eps": 1e-5, "embedding": True},
    "blocks": {
        "k": {"head_dim": HEAD, "lora_rank": {"decay": 3, "rate": 2, "value": 4, "gate": 5}},
        "d": {"width": 4 * WIDTH, "activation": "relu2", "token_shift": True},
    },
}


def model() -> LanguageModel:
    """In fp64, with weights larger and less regular than initial ones."""
    made = build(resolve_model(ARCH, VOCAB), seed=0).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += noise * (0.3 if parameter.dim() > 1 else 0.1)
    return made


def layer_norm(x_D: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float = 1e-5) -> Tensor:
    return (x_D - x_D.mean()) / (x_D.var(correction=0) + eps).sqrt() * weight_D + bias_D


def time_mix(w: dict[str, Tensor], xs: list[Tensor], first: list[Tensor]) -> list[Tensor]:
    """Outputs of all positions; first: the first layer's values, which it fills."""
    states = {head: torch.zeros(HEAD, HEAD, dtype=torch.float64) for head in range(WIDTH // HEAD)}  # values by keys
    before, outputs = torch.zeros(WIDTH, dtype=torch.float64), []
    leading = "residual.up" not in w
    for t, x in enumerate(xs):
        x_r, x_w, x_k, x_v, x_a, x_g = (x + (before - x) * mix for mix in w["mix"])
        before = x
        r, k, v = w["receptance.weight"] @ x_r, w["key.weight"] @ x_k, w["value.weight"] @ x_v
        decay = w["decay.up"] @ torch.tanh(w["decay.down"] @ x_w) + w["decay.bias"]
        decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(decay))
        rate = torch.sigmoid(w["rate.up"] @ (w["rate.down"] @ x_a) + w["rate.bias"])
        gate = w["gate.up"] @ torch.sigmoid(w["gate.down"] @ x_g)
        if leading:
            first.append(v)
        else:
            share = torch.sigmoid(w["residual.up"] @ (w["residual.down"] @ x_v) + w["residual.bias"])
            v = v + (first[t] - v) * share
        removal = k * w["k_k"].flatten()
        k = k * (1 + (rate - 1) * w["k_a"].flatten())
        out = torch.zeros(0, dtype=torch.float64)
        for head in range(WIDTH // HEAD):
            at = slice(head * HEAD, (head + 1) * HEAD)
            kappa = removal[at] / removal[at].norm()
            transition = torch.diag(decay[at]) - torch.outer(kappa, rate[at] * kappa)
            states[head] = states[head] @ transition + torch.outer(v[at], k[at])
            read = states[head] @ r[at]
            normed = layer_norm(read, w["norm_weight"][head], w["norm_bias"][head], HEAD * 1e-5)
            bonus = (r[at] * w["r_k"][head] * k[at]).sum() * v[at]
            out = torch.cat((out, normed + bonus))
        outputs.append(w["output.weight"] @ (out * gate))
    return outputs


def channel_mix(w: dict[str, Tensor], xs: list[Tensor]) -> list[Tensor]:
    before, outputs = torch.zeros(WIDTH, dtype=torch.float64), []
    for x in xs:
        mixed = x + (before - x) * w["mix"][0]
        before = x
        outputs.append(w["down.weight"] @ torch.relu(w["up.weight"] @ mixed) ** 2)
    return outputs


def slow_logits(weights: dict[str, Tensor], tokens_T: Tensor) -> Tensor:
    def under(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}

    def norm(prefix: str, stream: list[Tensor]) -> list[Tensor]:
        return [layer_norm(x, weights[f"{prefix}.weight"], weights[f"{prefix}.bias"]) for x in stream]

    stream = norm("embedding_norm", [weights["embedding.weight"][token] for token in tokens_T])
    first: list[Tensor] = []
    for number in range(6):
        inputs = norm(f"layers.{number}.norm", stream)
        if number % 2 == 0:
            outputs = time_mix(under(f"layers.{number}.branches.k."), inputs, first)
        else:
            outputs = channel_mix(under(f"layers.{number}.branches.d."), inputs)
        stream = [x + y for x, y in zip(stream, outputs, strict=True)]
    return torch.stack(norm("norm", stream)) @ weights["head.weight"].T


def test_logits_and_gradients():
    ours = model()
    tokens = torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(2))
    labels = tokens.roll(-1)
    names = [name for name, _ in ours.named_parameters()]
    copies = {name: parameter.detach().clone().requires_grad_() for name, parameter in ours.named_parameters()}
    wanted = slow_logits(copies, tokens)
    hidden = ours(tokens[None])
    torch.testing.assert_close(ours.logits(hidden)[0], wanted, rtol=1e-9, atol=1e-10)
    ours.loss_sum(hidden, labels[None]).backward()
    loss = torch.nn.functional.cross_entropy(wanted, labels, reduction="sum")
    for name, truth in zip(names, torch.autograd.grad(loss, [copies[name] for name in names]), strict=True):
        mine = ours.get_parameter(name).grad
        torch.testing.assert_close(mine, truth, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_the_first_weights_are_the_published_ones():
    """Values worked out by hand from RWKV-LM's x070 rules for the second of three layers, width 12, heads of 4."""
    layer = build(resolve_model(ARCH, VOCAB), seed=0).layers[2].branches["k"]  # type: ignore[index,union-attr]
    channel = torch.arange(WIDTH)
    assert layer.mix[0].tolist() == pytest.approx((1 - (channel / 12) ** (0.2 * 2 / 3)).tolist(), abs=1e-6)
    assert layer.mix[4].tolist() == pytest.approx((1 - (channel / 12) ** (0.9 * 2 / 3)).tolist(), abs=1e-6)
    power = 1 + 0.5**0.3
    assert layer.decay.bias[0].item() == pytest.approx(-6 + 0.5 - 2.5)  # the slowest channel, first of its head
    assert layer.decay.bias[11].item() == pytest.approx(0 + 0.5 + 2.5)
    assert layer.decay.bias[5].item() == pytest.approx(-6 + 6 * (5 / 11) ** power + 0.5 - 2.5 / 9)
    assert layer.rate.bias[5].item() == pytest.approx(-0.19 - 0.3 / 9 + 0.4 * (5 / 11 - 0.5))
    assert layer.residual.bias[0].item() == pytest.approx(0.73 + 0.2)
    assert layer.k_k.flatten()[11].item() == pytest.approx(0.71 - 0.05)
    assert not layer.output.weight.any() and not layer.gate.down.any()
    gate = layer.gate.up
    torch.testing.assert_close(gate.T @ gate, 0.01 * torch.eye(5), rtol=1e-5, atol=1e-6)
    assert layer.receptance.weight.abs().max() <= 0.5 * WIDTH**-0.5
    assert layer.key.weight.abs().max() <= 0.05 * WIDTH**-0.5
