import pytest
import torch
from torch import nn

from tests.train.runs import ARCHS
from zexp.blocks.resolve import resolve_model
from zexp.model.build import build, decayed
from zexp.train import optimizer

OPTIM = {"kind": "adamw", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}


def model_of(arch):
    return build(resolve_model(ARCHS[arch], 300), seed=0)


@pytest.mark.parametrize("arch", ["transformer", "zamba2"])
def test_only_the_matrices_of_linear_maps_decay(arch):
    model = model_of(arch)
    made = optimizer.build(model, OPTIM, decayed(model))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert decays.keys() == dict(model.named_parameters()).keys()
    assert decays["embedding.weight"] == decays["norm.weight"] == 0.0
    for name, parameter in model.named_parameters():
        linear = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear) and parameter.ndim == 2
        assert decays[name] == (0.1 if linear else 0.0), name


def test_a_step_is_adamws_by_its_definition():
    model = nn.Linear(3, 2).double()
    made = optimizer.build(model, OPTIM, ["weight"])
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for t, lr in enumerate((1e-2, 3e-2, 2e-2), start=1):
        (model(torch.ones(1, 3).double() * t) ** 2).sum().backward()
        for name, p in model.named_parameters():
            decay = 0.1 if name == "weight" else 0.0
            first[name] = 0.9 * first[name] + 0.1 * p.grad
            second[name] = 0.95 * second[name] + 0.05 * p.grad**2
            update = (first[name] / (1 - 0.9**t)) / ((second[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            expected[name] = expected[name] * (1 - lr * decay) - lr * update
        optimizer.step(made, lr)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-14)
        assert p.grad is None


@pytest.mark.parametrize("limit", [None, 0.0, 100.0])
def test_small_gradients_are_left_as_they_are(limit):
    model = nn.Linear(3, 2)
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    assert optimizer.clip(model, limit).item() == pytest.approx(2.0 * 8**0.5)
    assert all((p.grad == 2.0).all() for p in model.parameters())


def test_large_gradients_are_scaled_to_the_limit_and_the_norm_before_is_returned():
    model = nn.Linear(3, 2)
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    assert optimizer.clip(model, 1.0).item() == pytest.approx(2.0 * 8**0.5)
    assert torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item() == pytest.approx(1.0, rel=1e-5)


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"optim.kind = 'lion'"):
        optimizer.build(nn.Linear(2, 2), OPTIM | {"kind": "lion"}, [])
    with pytest.raises(ValueError, match="names no parameter of the model: scale"):
        optimizer.build(nn.Linear(2, 2), OPTIM, ["scale"])
