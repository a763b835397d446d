"""The norm per head against its formula: values and every gradient."""

from __future__ import annotations

import pytest
import torch

from zexp.kernels.head_norm import reference
from zexp.kernels.head_norm.torch_backend import head_norm

ACTIVATIONS = [None, "silu", "sigmoid"]


@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("shared", [False, True], ids=["a weight a head", "shared weight"])
@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_head_norm(activation, centred, shared, transposed):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2, 4, 5) if transposed else (2, 3, 4, 5), (5,) if shared else (4, 5), (2, 3, 20)]
    x, weight, gate = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    inputs = [x, weight] if activation is None else [x, weight, gate]

    def run(norm):
        turned = x.transpose(0, 1) if transposed else x
        keys = {} if activation is None else {"gate_BTI": gate, "activation": activation}
        out = norm(turned, weight, 1e-3, centred=centred, **keys)
        return out, torch.autograd.grad((out * torch.linspace(-1, 1, 20)).pow(3).sum(), inputs)

    (ours, gradients), (truth, true_gradients) = run(head_norm), run(reference.head_norm)
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)
    for mine, true in zip(gradients, true_gradients, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-11)


def test_a_head_of_zeros_has_a_finite_gradient():
    x = torch.zeros(1, 1, 2, 4, requires_grad=True)
    head_norm(x, torch.ones(4), 1e-6, centred=True).sum().backward()
    assert torch.isfinite(x.grad).all()
