"""Weights, loss and what a model promises about its batch."""

from __future__ import annotations

import math

import pytest
import torch

from tests.blocks.archs import MIXED, TINY
from zexp.blocks.resolve import resolve_model
from zexp.config.errors import ConfigError
from zexp.model.build import build, decayed
from zexp.model.language_model import LanguageModel

VOCAB = 61


def mixed(seed: int | None = 0) -> LanguageModel:
    return build(resolve_model(MIXED, VOCAB), seed=seed)


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = mixed().state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    second = mixed().state_dict()
    torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are used up
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], mixed(seed=1).state_dict()["embedding.weight"])


def test_every_weight_is_drawn():
    model = build(resolve_model(MIXED, VOCAB), seed=None, device="meta")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.initialise(torch.Generator().manual_seed(0))
    assert not [name for name, parameter in model.named_parameters() if parameter.isnan().any()]


def test_initial_weights_are_the_published_ones():
    model = build(resolve_model(TINY["mamba2_tiny"], 4096), seed=0)
    mixer = model.layers[0].branches["m"]
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert mixer.out_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(7), rel=0.02)
    decay = mixer.A_log.exp()
    assert decay.min() >= 1 and decay.max() <= 16
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert dt.min() >= 0.999e-3 and dt.max() <= 0.1001
    assert mixer.D.eq(1).all() and mixer.norm_weight.eq(1).all()


@pytest.mark.parametrize("name", TINY)
def test_an_untrained_model_knows_nothing(name):
    model = build(resolve_model(TINY[name], 4096), seed=0)
    drawn = torch.randint(0, 4096, (2, 65), generator=torch.Generator().manual_seed(0))
    loss = model.loss_sum(model(drawn[:, :-1]), drawn[:, 1:]).item() / 128
    # Logits have a standard deviation of 0.02 · √128 = 0.23: 0.03 on the mean, 0.02 noise of 128 labels.
    assert loss == pytest.approx(math.log(4096), abs=0.1)


def test_loss_sum_is_the_cross_entropy_of_the_logits():
    model, drawn = mixed(), tokens(3, 20)
    labels = drawn.roll(-1, 1)
    labels[1, :7] = -100
    hidden = model(drawn)
    logits = model.logits(hidden)
    assert logits.dtype == torch.float32
    truth = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(model.loss_sum(hidden, labels), truth)


def test_micro_batches_add_up_to_the_batch():
    model, drawn = mixed().double(), tokens(4, 24)
    model.loss_sum(model(drawn[:, :-1]), drawn[:, 1:]).backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for part in drawn.split(1):
        model.loss_sum(model(part[:, :-1]), part[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-9, atol=1e-10)


def test_nothing_looks_ahead():
    model, drawn = mixed().double(), tokens(1, 24)
    changed = drawn.clone()
    changed[0, 15:] = (changed[0, 15:] + 1) % VOCAB
    before, after = model(drawn), model(changed)
    torch.testing.assert_close(before[:, :15], after[:, :15], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 15:], after[:, 15:])


def test_packed_documents_equal_separate_ones_forward_and_backward():
    model, drawn = mixed().double(), tokens(2, 24)
    lengths = [[5, 1, 11, 7], [16, 8]]
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    labels = drawn.roll(-1, 1)
    packed = model(drawn, ids)
    model.loss_sum(packed, labels).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row, sizes in enumerate(lengths):
        pieces = zip(drawn[row].split(sizes), labels[row].split(sizes), packed[row].split(sizes), strict=True)
        for piece, wanted, hidden in pieces:
            alone = model(piece[None])
            torch.testing.assert_close(alone[0], hidden, rtol=1e-9, atol=1e-10)
            model.loss_sum(alone, wanted[None]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-8, atol=1e-9, msg=name)


def test_a_row_of_one_document_needs_no_ids():
    model, drawn = mixed(), tokens(2, 24)
    torch.testing.assert_close(model(drawn), model(drawn, torch.full((2, 24), 4)), rtol=1e-4, atol=1e-5)


def test_two_runs_give_the_same_bits():
    def gradients() -> list[torch.Tensor]:
        model, drawn = mixed(), tokens(4, 33)
        model.loss_sum(model(drawn[:, :-1]), drawn[:, 1:]).backward()
        return [parameter.grad for parameter in model.parameters()]

    assert all(torch.equal(one, other) for one, other in zip(gradients(), gradients(), strict=True))


def test_shared_copies_are_called_in_turn():
    model, drawn = mixed(), tokens(1, 8)
    called = []
    for number, copy in enumerate(model.shared["g"]):
        copy.register_forward_hook(lambda *_, number=number: called.append(number))
    model(drawn)
    assert called == [0, 1, 0, 1]


def test_only_matrices_of_linear_maps_decay():
    names = set(decayed(mixed()))
    assert {"head.weight", "layers.0.branches.m.in_proj.weight", "layers.1.call.mlp.up.weight"} <= names
    kept = {name for name, _ in mixed().named_parameters()} - names
    assert {name.rsplit(".", 1)[-1] for name in kept} == {
        "weight", "bias", "conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight",
    }  # fmt: skip
    assert all("norm" in name or name == "embedding.weight" for name in kept if name.endswith(".weight"))
    tied = build(resolve_model(TINY["zamba2_tiny"], VOCAB), seed=0)
    assert "embedding.weight" not in decayed(tied)


def test_kernels_that_cannot_be_had_are_refused_before_anything_is_built():
    with pytest.raises(ConfigError, match="kernels = fused"):
        build(resolve_model(TINY["mamba2_tiny"], VOCAB), seed=0, kernels="fused")
