"""What a model promises whatever its pattern is: patterns, tables and joins drawn over every letter."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.blocks import small
from tests.blocks.test_contract import VOCAB, spread, tokens
from zexp.blocks.resolve import resolve_model
from zexp.blocks.table import spec_class
from zexp.calc import model as calc
from zexp.model.build import build

ROLES = {letter: spec_class(letter).ROLE for letter in small.LETTERS}
MIXERS = [letter for letter, role in ROLES.items() if role == "mixer"]
LETTERS = [letter for letter, role in ROLES.items() if role != "feeder"]
FEEDERS = [letter for letter, role in ROLES.items() if role == "feeder"]


@st.composite
def architectures(draw: st.DrawFn) -> dict[str, Any]:
    """Two to five layers of any letters, some fed, some of two or three branches."""
    branches = st.lists(st.sampled_from(LETTERS), min_size=2, max_size=3, unique=True).map(lambda b: f"({'|'.join(b)})")
    fed = st.builds(str.__add__, st.sampled_from(FEEDERS), st.sampled_from(MIXERS))
    layers = draw(st.lists(st.one_of(st.sampled_from(LETTERS), branches, fed), min_size=2, max_size=5))
    letters = sorted({char for layer in layers for char in layer if char.isalpha()})
    calls = {letter: sum(layer.startswith(letter) for layer in layers) for letter in FEEDERS}
    blocks = {}
    for letter in letters:
        legal = [t for t in small.tables(letter).values() if letter not in calls or t.get("copies", 1) <= calls[letter]]
        blocks[letter] = draw(st.sampled_from(legal))
    arch = {"pattern": " ".join(layers), "width": small.WIDTH, "blocks": blocks}
    arch["tie_embeddings"] = draw(st.booleans())
    arch["norm"] = {
        "kind": draw(st.sampled_from(["rmsnorm", "layernorm"])),
        "final": draw(st.sampled_from([None, "rmsnorm", "layernorm"])),
        "embedding": draw(st.booleans()),
    }
    if any("|" in layer for layer in layers):
        arch["parallel"] = {
            "combine": draw(st.sampled_from(["sum", "mean", "scaled_mean"])),
            "norms": draw(st.sampled_from(["shared", "separate"])),
        }
    arch["logit_softcap"] = draw(st.sampled_from([None, 5.0]))
    return arch


@settings(max_examples=30, deadline=None)
@given(arch=architectures(), seed=st.integers(0, 3), cuts=st.lists(st.integers(1, 39), max_size=4))
def test_decoding_in_any_pieces_equals_the_full_forward(arch, seed, cuts):
    model = spread(build(resolve_model(arch, VOCAB), seed=seed)).eval()
    drawn = tokens()
    with torch.no_grad():
        full = model.logits(model(drawn))
    edges = sorted({0, *cuts, drawn.shape[1]})
    cache = model.new_cache(batch=2)
    parts = [model.decode(drawn[:, a:b], cache) for a, b in itertools.pairwise(edges)]
    torch.testing.assert_close(model.logits(torch.cat(parts, dim=1)), full, rtol=1e-6, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(arch=architectures(), seed=st.integers(0, 3), cuts=st.lists(st.integers(1, 39), min_size=1, max_size=6))
def test_packed_documents_equal_separate_ones(arch, seed, cuts):
    model = spread(build(resolve_model(arch, VOCAB), seed=seed)).eval()
    drawn = tokens(batch=1)
    edges = sorted({0, *cuts, drawn.shape[1]})
    sizes = [b - a for a, b in itertools.pairwise(edges)]
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[None]
    labels = drawn.roll(-1, 1)
    packed = model(drawn, ids)
    model.loss_sum(packed, labels).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    pieces = zip(drawn[0].split(sizes), labels[0].split(sizes), packed[0].split(sizes), strict=True)
    for piece, wanted, hidden in pieces:
        alone = model(piece[None])
        torch.testing.assert_close(alone[0], hidden, rtol=1e-6, atol=1e-7)
        model.loss_sum(alone, wanted[None]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-6, msg=name)


@settings(max_examples=60, deadline=None)
@given(arch=architectures())
def test_parameters_and_caches_are_counted_exactly(arch):
    model = build(resolve_model(arch, VOCAB), seed=0)
    assert calc.parameters(model.semantic)["total"] == sum(parameter.numel() for parameter in model.parameters())
    cache = model.new_cache(batch=1)
    model.decode(tokens(11, batch=1), cache)
    assert calc.cache_bytes(model.semantic, context=11, element_bytes=4) == cache.bytes()
