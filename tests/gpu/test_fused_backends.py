"""Fused kernels on a GPU: parity with the references, whole models against the torch backends, and same bits when repeated."""

from __future__ import annotations

import pytest
import torch

from tests.blocks.archs import MIXED, TINY
from zexp.blocks.resolve import numerics, resolve_model
from zexp.kernels import dispatch, select, selfcheck
from zexp.model.build import build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

PAIRS = [(operation, backend) for operation, row in select.BACKENDS.items() for backend in row]
ARCHS = {
    **TINY,
    "mixed": MIXED,
    "mamba1": {"pattern": "2*(r d)", "width": 128, "blocks": {"r": {}, "d": {"width": 256}}},
    "rwkv7": {"pattern": "2*(k d)", "width": 128, "blocks": {"k": {"head_dim": 64}, "d": {"width": 256}}},
    "retention": {"pattern": "2*(t d)", "width": 128, "blocks": {"t": {"heads": 2}, "d": {"width": 256}}},
    "deltanet": {"pattern": "2*(l d)", "width": 128, "blocks": {"l": {"key_heads": 2}, "d": {"width": 256}}},
    "window": {"pattern": "2*(w d)", "width": 128, "blocks": {"w": {"heads": 2, "window": 33}, "d": {"width": 256}}},
}


@pytest.mark.parametrize(("operation", "backend"), PAIRS, ids=lambda x: getattr(x, "name", x))
def test_a_backend_that_nothing_speaks_against_agrees_with_the_reference(operation, backend):
    device = torch.device("cuda")
    against = select.reason_against(operation, backend, dispatch.machine(device), deterministic=False)
    if against is not None:
        pytest.skip(against)
    assert selfcheck.examine(operation, backend, device) is None


def trained(semantic, kernels, deterministic=False):
    """Loss and gradients of packed rows under bf16 autocast."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        model = build(semantic, seed=0, kernels=kernels, device="cuda")
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(300, (2, 301), generator=generator).cuda()
        ids = torch.tensor([[0] * 170 + [1] * 130, [4] * 30 + [9] * 270]).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.loss_sum(model(tokens[:, :-1], ids), tokens[:, 1:]) / 600
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_trains_as_on_the_torch_backends(arch):
    semantic = resolve_model(ARCHS[arch], 300)
    choices = dispatch.chosen("auto", select.operations_of(numerics(semantic)), "cuda", deterministic=False)
    if all(choice.backend is None for choice in choices.values()):
        pytest.skip("no fused backend is taken here")
    (loss, gradient), (wanted, wanted_gradient) = trained(semantic, "auto"), trained(semantic, "torch")
    assert loss == pytest.approx(wanted, rel=2e-3)  # means of 600 bf16 roundings
    assert (gradient - wanted_gradient).norm() / wanted_gradient.norm() < 0.05  # two layers of the self-check's 0.03


@pytest.mark.parametrize("arch", ARCHS)
def test_deterministic_algorithms_give_the_same_bits_twice(arch):
    semantic = resolve_model(ARCHS[arch], 300)
    first, second = (trained(semantic, "auto", deterministic=True) for _ in range(2))
    assert first[0] == second[0] and torch.equal(first[1], second[1])


def test_the_loss_without_gradients_is_the_same():
    """Evaluation calls the same kernels in inference mode, before and after a training does."""
    semantic = resolve_model(TINY["zamba2_tiny"], 300)
    model = build(semantic, seed=0, device="cuda")
    tokens = torch.randint(300, (2, 301), generator=torch.Generator().manual_seed(0)).cuda()

    def loss():
        with torch.autocast("cuda", torch.bfloat16):
            return model.loss_sum(model(tokens[:, :-1]), tokens[:, 1:])

    with torch.inference_mode():
        before = loss().item()
    trained_loss = loss()
    trained_loss.backward()
    assert trained_loss.item() == pytest.approx(before, rel=1e-3)
