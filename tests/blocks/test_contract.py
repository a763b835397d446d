"""What every block promises, for every letter and each of its small tables: tests/blocks/small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.blocks import small
from zexp.blocks.base import BlockSpec, FeederSpec
from zexp.blocks.context import Context
from zexp.blocks.layer import Place
from zexp.blocks.resolve import resolve_model, specs_of
from zexp.blocks.table import layer_module
from zexp.calc import model as calc
from zexp.model.build import build
from zexp.model.language_model import LanguageModel

VOCAB, LENGTH = 31, 40
every_table = pytest.mark.parametrize(("letter", "name"), small.CASES, ids=small.IDS)


def built(letter: str, name: str, seed: int | None = 0, **keys: Any) -> LanguageModel:
    return build(resolve_model(small.arch(letter, name), VOCAB), seed=seed, **keys)


def spread(model: LanguageModel) -> LanguageModel:
    """Weights that are larger and less regular than initial ones, in fp64: a term that is missing shows."""
    generator = torch.Generator().manual_seed(1)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += noise * (0.3 if parameter.dim() > 1 else 0.1)
    return model


def tokens(length: int = LENGTH, batch: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


@every_table
def test_parameters_are_those_of_the_module(letter, name):
    model = built(letter, name, seed=None, device="meta")
    assert calc.parameters(model.semantic)["total"] == sum(p.numel() for p in model.parameters())


@every_table
def test_every_weight_is_drawn(letter, name):
    model = built(letter, name, seed=None, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    model.initialise(torch.Generator().manual_seed(0))
    assert not [key for key, tensor in model.state_dict().items() if tensor.isnan().any()]


@every_table
def test_nothing_looks_ahead(letter, name):
    model, drawn = spread(built(letter, name)).eval(), tokens()
    changed = drawn.clone()
    changed[:, 25:] = (changed[:, 25:] + 1) % VOCAB
    before, after = model(drawn), model(changed)
    torch.testing.assert_close(before[:, :25], after[:, :25], rtol=0, atol=1e-11)
    assert not torch.allclose(before[:, 25:], after[:, 25:])


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@every_table
def test_packed_documents_are_separate_ones_forward_and_backward(letter, name, training):
    model, drawn = spread(built(letter, name)).train(training), tokens()
    lengths = [[5, 1, 11, 7, 16], [26, 14]]
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    labels = drawn.roll(-1, 1)
    packed = model(drawn, ids)
    model.loss_sum(packed, labels).backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    for row, sizes in enumerate(lengths):
        pieces = zip(drawn[row].split(sizes), labels[row].split(sizes), packed[row].split(sizes), strict=True)
        for piece, wanted, hidden in pieces:
            alone = model(piece[None])
            torch.testing.assert_close(alone[0], hidden, rtol=1e-7, atol=1e-9)
            model.loss_sum(alone, wanted[None]).backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[key], rtol=1e-6, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}"
        )


@every_table
def test_prefill_then_steps_equal_the_full_forward(letter, name):
    model, drawn = spread(built(letter, name)).eval(), tokens()
    with torch.no_grad():
        full = model(drawn)
    cache = model.new_cache(batch=2)
    parts = [model.decode(drawn[:, start:end], cache) for start, end in ((0, 17), (17, 18), (18, 24), (24, 25))]
    parts += [model.decode(drawn[:, t : t + 1], cache) for t in range(25, LENGTH)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-7, atol=1e-9)


@every_table
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("seen", [1, 9, 40])
def test_cache_bytes_are_those_of_a_real_cache(letter, name, seen, dtype):
    model = built(letter, name).to(dtype)
    cache = model.new_cache(batch=3)
    model.decode(tokens(seen, batch=3), cache)
    assert calc.cache_bytes(model.semantic, context=seen, element_bytes=dtype.itemsize) * 3 == cache.bytes()


# What a layer that is not the first of its letter reads from the pass's notes: letter -> (spec, batch, length) -> notes.
NOTES: dict[str, Callable[[Any, int, int], dict[str, Tensor]]] = {
    "k": lambda spec, batch, length: {"rwkv7.first_values": torch.randn(batch, length, small.WIDTH)},
}


def alone(letter: str, name: str) -> tuple[BlockSpec, list[nn.Parameter], Callable[[Tensor], Tensor]]:
    """The spec, the weights and the forward pass of one layer, or of one call of a feeder, out of its model."""
    spec = specs_of(resolve_model(small.arch(letter, name), VOCAB))[letter]
    module = layer_module(letter)
    if isinstance(spec, FeederSpec):
        parts = [module.Shared(spec, small.WIDTH, 1e-5), module.Call(spec, small.WIDTH, 1e-5)]
    else:
        parts = [module.Layer(spec, small.WIDTH, 1e-5, Place(1, 3))]
    weights = [weight for part in parts for weight in part.parameters()]
    for weight in weights:
        nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))

    def run(x: Tensor) -> Tensor:
        if isinstance(spec, FeederSpec):
            return parts[0](x, x, parts[1], Context())
        notes = NOTES[letter](spec, x.shape[0], x.shape[1]) if letter in NOTES else {}
        return parts[0](x, Context(auxiliary=[], notes=notes))

    return spec, weights, run


@every_table
def test_what_is_kept_for_the_backward_pass_is_what_the_spec_says(letter, name):
    spec, weights, run = alone(letter, name)
    batch, length = 2, 64
    storages: dict[int, int] = {weight.untyped_storage().data_ptr(): 0 for weight in weights}
    alive = []  # else an address may be given to two tensors

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(torch.randn(batch, length, small.WIDTH, requires_grad=True))
    kept = sum(storages.values()) / 4 / (batch * length)
    assert kept == pytest.approx(spec.saved_elements(small.WIDTH, length), rel=0.1)


# How products with weight matrices show; sLSTM's matrices are block-diagonal, and it has no products of two activations.
MATMULS = dict.fromkeys(small.LETTERS, ("mm", "addmm")) | {"s": ("bmm", "baddbmm")}


@every_table
def test_matmul_flops_are_those_that_torch_counts(letter, name):
    spec, _, run = alone(letter, name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(torch.randn(1, 64, small.WIDTH))
    counted = counter.get_flop_counts()["Global"]
    products = sum(counted.get(getattr(torch.ops.aten, operation), 0) for operation in MATMULS[letter])
    assert products / 64 == pytest.approx(spec.matmul_flops(small.WIDTH))
