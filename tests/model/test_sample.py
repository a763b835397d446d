"""Decoding token by token: what a full pass would choose, what a seed draws, text that comes in whole characters."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from zexp.blocks.resolve import resolve_model
from zexp.model.build import build
from zexp.model.sample import generate, nucleus, text_of

VOCAB = 50
ARCHS = {
    "attention": {"pattern": "2*(a d)", "blocks": {"a": {"heads": 4}, "d": {"width": 44}}},
    "zamba2": {
        "pattern": "m gm w",
        "blocks": {
            "m": {"state_size": 8, "head_dim": 8, "chunk": 4},
            "g": {"heads": 4, "mlp_width": 24, "lora_rank": {"mlp": 2}},
            "w": {"heads": 4, "window": 5},
        },
    },
}


@pytest.fixture(params=ARCHS)
def model(request):
    built = build(resolve_model({"width": 32, **ARCHS[request.param]}, VOCAB), seed=0).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(3)  # initial weights give nearly equal logits
    return built


def drawn(model, prompt=(0, 5, 9), tokens=24, temperature=1.0, top_p=1.0, seed=0, eod_id=-1, vocab_size=None):
    options = {"tokens": tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "eod_id": eod_id}
    options["vocab_size"] = vocab_size
    return list(generate(model, prompt, **options))


def test_greedy_is_the_argmax_of_full_passes(model):
    tokens = [0, 5, 9]
    with torch.no_grad():
        for _ in range(24):
            tokens.append(int(model.logits(model(torch.tensor([tokens]))[0, -1]).argmax()))
    assert drawn(model, temperature=0, top_p=0.5) == tokens[3:]
    assert len(set(tokens)) > 4, "something is chosen"


def test_a_seed_is_a_text(model):
    assert drawn(model, seed=3) == drawn(model, seed=3)
    assert len({tuple(drawn(model, seed=seed)) for seed in range(5)}) == 5
    before = torch.random.get_rng_state()
    drawn(model)
    assert torch.equal(before, torch.random.get_rng_state()), "nobody else's draws are touched"


def test_it_ends_before_the_end_of_the_document(model):
    free = drawn(model, seed=1)
    eod_id = free[7]
    assert drawn(model, seed=1, eod_id=eod_id) == free[: free.index(eod_id)]
    assert drawn(model, tokens=5) == drawn(model)[:5]


def test_rows_without_a_token_are_never_chosen(model):
    free = drawn(model, tokens=60)
    assert max(free) >= 30
    assert max(drawn(model, tokens=60, vocab_size=30)) < 30
    assert max(drawn(model, tokens=60, temperature=0, vocab_size=3)) < 3


def test_hardly_any_temperature_and_a_tiny_nucleus_are_greedy(model):
    assert drawn(model, temperature=1e-4) == drawn(model, top_p=1e-6) == drawn(model, temperature=0)


def test_the_nucleus_of_a_known_distribution():
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    for top_p, kept in (
        (0.39, [1]),
        (0.4, [1]),
        (0.41, [1, 3]),
        (0.7, [1, 3]),
        (0.75, [1, 2, 3]),
        (0.95, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ):
        assert nucleus(probabilities.double(), top_p).nonzero().flatten().tolist() == kept, top_p


@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=20), st.floats(1e-3, 1.0))
def test_a_nucleus_is_the_smallest_set_that_has_its_share(weights, top_p):
    probabilities = torch.tensor(weights, dtype=torch.float64)
    probabilities /= probabilities.sum()
    kept = nucleus(probabilities, top_p)
    chosen, left_out = kept[kept > 0], probabilities[kept == 0]
    assert len(chosen) >= 1 and torch.equal(chosen, probabilities[kept > 0])
    assert chosen.sum() >= top_p - 1e-9
    assert chosen.sum() - chosen.min() < top_p + 1e-9, "one less is not enough"
    assert len(left_out) == 0 or left_out.max() <= chosen.min()


@pytest.fixture(scope="module")
def bytewise() -> Tokenizer:
    """Of the 256 bytes alone, so that every character but ASCII is several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def test_characters_come_whole(bytewise):
    text = "a Ω – 𝄞 e\u0301 🙂!"
    pieces = list(text_of(bytewise, iter(bytewise.encode(text).ids)))
    assert pieces == list(text)


@given(st.binary(max_size=24))
def test_no_bytes_are_lost_and_nothing_is_taken_back(bytewise, content):
    table = bytewise.get_vocab()
    by_byte = {byte: table[bytewise.encode(chr(byte)).tokens[0]] for byte in range(128)}
    for byte in range(128, 256):  # of two-byte characters both tokens are known
        high, low = chr(byte).encode()
        tokens = bytewise.encode(chr(byte)).ids
        by_byte[high], by_byte[low] = tokens
    ids = [by_byte[byte] for byte in content if byte in by_byte]
    pieces = list(text_of(bytewise, iter(ids)))
    assert "".join(pieces) == bytewise.decode(ids)
    assert all(pieces)


def test_text_comes_as_soon_as_it_is_sure(bytewise):
    ids = bytewise.encode("ab𝄞c").ids
    seen = []

    def watched():
        for id_ in ids:
            yield id_
            seen.append(None)

    arrivals = [(piece, len(seen)) for piece in text_of(bytewise, watched())]
    assert arrivals == [("a", 0), ("b", 1), ("𝄞", 5), ("c", 6)]
    assert list(text_of(bytewise, itertools.islice(iter(ids), 4))) == ["a", "b", "\ufffd"], (
        "what never becomes whole is said at the end"
    )
