"""Parameters, FLOPs and bytes against what is built, counted by torch, or published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

from tests.blocks.archs import MIXED, TINY, TINY_PARAMETERS, architectures
from zexp.blocks.resolve import resolve_model
from zexp.calc.model import block_table, checkpoint_bytes, flops_per_token, kv_bytes_per_token, parameters, state_bytes
from zexp.model.build import build

ZAMBA2_M = {"state_size": 64, "head_dim": 64, "chunk": 256}
ZAMBA2_G = {"heads": 32, "lora_rank": {"mlp": 128}}


def zamba2(positions: list[int], depth: int) -> str:
    return " ".join("gm" if layer in positions else "m" for layer in range(depth))


# vocabulary, architecture, parameters: the published models (sizes from their configs, counts from their weights).
PUBLISHED: dict[str, tuple[int, dict[str, Any], int]] = {
    "Zamba2-1.2B": (
        32000,
        {
            "pattern": "6*(5*m gm) 2*m",
            "width": 2048,
            "blocks": {
                "m": {"state_size": 128, "head_dim": 64},
                "g": {
                    "heads": 32,
                    "mlp_width": 8192,
                    "lora_rank": {"mlp": 128, "attention": 128},
                    "rope_theta": 10000.0,
                },
            },
        },
        1_215_064_704,
    ),
    "Zamba2-2.7B": (
        32000,
        {
            "pattern": zamba2([6, 12, 18, 24, 30, 36, 42, 47, 51], 54),
            "width": 2560,
            "blocks": {"m": ZAMBA2_M, "g": {**ZAMBA2_G, "copies": 2, "mlp_width": 10240}},
        },
        2_662_214_560,
    ),
    "Zamba2-7B": (
        32000,
        {
            "pattern": zamba2([6, *range(11, 78, 6)], 81),
            "width": 3584,
            "blocks": {
                "m": {**ZAMBA2_M, "groups": 2},
                "g": {**ZAMBA2_G, "copies": 2, "mlp_width": 14336, "rope_theta": 10000.0},
            },
        },
        7_356_749_648,
    ),
    "Mamba2-130m": (50288, {"pattern": "24*m", "width": 768, "blocks": {}}, 128_989_632),
    "Mamba2-2.7b": (50288, {"pattern": "64*m", "width": 2560, "blocks": {}}, 2_702_599_680),
    "Llama-3.2-1B": (
        128256,
        {
            "pattern": "16*(a d)",
            "width": 2048,
            "blocks": {"a": {"heads": 32, "kv_heads": 8, "rope_theta": 500000.0}, "d": {"width": 8192}},
        },
        1_235_814_400,
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_the_tiny_models_have_their_published_size(name):
    counted = parameters(resolve_model(TINY[name], 4096))
    assert counted == {"total": TINY_PARAMETERS[name], "active": TINY_PARAMETERS[name], "embedding": 4096 * 128}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_counted_exactly(name):
    vocab_size, arch, expected = PUBLISHED[name]
    assert parameters(resolve_model(arch, vocab_size))["total"] == expected


@settings(max_examples=60, deadline=None)
@given(architectures())
def test_formula_counts_what_is_built(arch):
    model = resolve_model(arch, 37)
    built = build(model, seed=None, device="meta")
    assert parameters(model)["total"] == sum(p.numel() for p in built.parameters())


def matmul_flops(model: dict[str, Any], seq_len: int) -> int:
    """FLOPs of aten.mm in a forward pass with logits, per token, as torch counts them."""
    built = build(model, seed=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built.logits(built(torch.zeros(1, seq_len, dtype=torch.long)))
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm)) // seq_len


def everything_but_matmuls(model: dict[str, Any], seq_len: int) -> float:
    """Causal scores, scans and convolutions by the formulas of the papers, per token."""
    total = 0.0
    a, m, g = (model["blocks"].get(letter) for letter in "amg")
    calls = {letter: sum(letter in layer for layer in model["pattern"]) for letter in "amg"}
    if a:
        total += calls["a"] * 2 * (seq_len + 1) * a["heads"] * a["head_dim"]
    if g:
        total += calls["g"] * 2 * (seq_len + 1) * 2 * model["width"]
    if m:
        inner, n, q = m["expand"] * model["width"], m["state_size"], min(m["chunk"], seq_len)
        total += calls["m"] * 2 * m["conv_width"] * (inner + 2 * m["groups"] * n)
        total += calls["m"] * (2 * q * n * m["groups"] + 2 * q * inner + 4 * n * inner + 2 * n * inner / q)
    return total


@pytest.mark.parametrize("name", [*TINY, "mixed"])
def test_matmul_flops_are_those_that_torch_counts(name):
    model = resolve_model(MIXED if name == "mixed" else TINY[name], 64)
    formula = flops_per_token(model, 32)["forward"] - everything_but_matmuls(model, 32)
    assert formula == matmul_flops(model, 32)


def test_zamba2_1p2b_forward_and_training_flops():
    # transformers' model under FlopCounterMode at 4096 tokens: 3518.496768 MFLOP a token of matrix products.
    vocab_size, arch, _ = PUBLISHED["Zamba2-1.2B"]
    model = resolve_model(arch, vocab_size)
    flops = flops_per_token(model, 4096)
    assert flops["forward"] - everything_but_matmuls(model, 4096) == 3_518_496_768
    assert flops["forward"] == pytest.approx(3.883e9, rel=1e-3)
    assert flops["train"] == 3 * flops["forward"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Zamba2-1.2B", 98_304), ("Zamba2-2.7B", 184_320), ("Zamba2-7B", 372_736), ("Llama-3.2-1B", 32_768)],
)
def test_every_call_of_a_shared_block_has_its_own_cache(name, expected):
    vocab_size, arch, _ = PUBLISHED[name]
    assert kv_bytes_per_token(resolve_model(arch, vocab_size)) == expected


def test_rows_sum_to_the_whole():
    model = resolve_model(MIXED, 64)
    rows = block_table(model, 32)
    assert sum(row.parameters for row in rows) == parameters(model)["total"]
    assert {row.letter: row.count for row in rows if row.letter} == {"m": 6, "g": 4, "a": 3, "d": 1}
    assert state_bytes(model, element_bytes=4) == 4 * 6 * (32 * 4 + (32 + 16) * 4)
    assert checkpoint_bytes(model)["full"] == 3 * checkpoint_bytes(model)["weights"]
