"""Exact parameters, FLOPs per token and bytes of a resolved model.

The model is the semantic block that zexp.blocks.resolve.resolve_model returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zexp.blocks import pattern
from zexp.blocks.base import FeederSpec
from zexp.blocks.resolve import Stack, specs_of, stack_of

TRAIN_PER_FORWARD = 3  # a backward pass is two forward passes; nothing is recomputed


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the block table: `count` things of the same kind, summed.

    parameters: stored weights. active: those that one token is computed with, null = all.
    flops: forward, per token. kv_bytes: per token of context. state_bytes: fixed.
    """

    name: str
    letter: str | None
    count: int
    parameters: int
    flops: float
    active: int | None = None
    kv_bytes: int = 0
    state_bytes: int = 0


def block_table(model: Mapping[str, Any], seq_len: int, element_bytes: int = 2) -> list[Row]:
    """What each part of the model costs; the rows sum to the whole.

    seq_len: length at which attention is counted. element_bytes: size of a cached number (2 = bf16).
    """
    stack, vocab, layers = stack_of(model), model["vocab_size"], model["pattern"]
    width = stack.width
    head = 0 if stack.tie_embeddings else vocab * width
    rows = [Row(name="embedding", letter=None, count=1, parameters=vocab * width, flops=0.0)]
    for letter, spec in specs_of(model).items():
        if isinstance(spec, FeederSpec):
            count = sum(pattern.feeder(layer) == letter for layer in layers)
            parameters = spec.copies * spec.parameters(width) + count * spec.call_parameters(width)
            idle = 0
        else:
            count = sum(letter in pattern.branches(layer) for layer in layers)
            parameters = count * spec.parameters(width) - spec.missing_in_first(width)
            idle = count * (spec.parameters(width) - spec.active_parameters(width))
        rows.append(
            Row(
                name=spec.NAME,
                letter=letter,
                count=count,
                parameters=parameters,
                active=parameters - idle,
                flops=count * spec.flops(width, seq_len),
                kv_bytes=count * spec.kv_bytes_per_token(width, element_bytes),
                state_bytes=count * spec.state_bytes(width, element_bytes),
            )
        )
    norms, final = _norms(stack, layers)
    vectors = {"rmsnorm": 1, "layernorm": 2}
    in_norms = norms * vectors[stack.norm.kind] * width + vectors[final] * width
    rows.append(Row(name="norms", letter=None, count=norms + 1, parameters=in_norms, flops=0.0))
    rows.append(Row(name="head", letter=None, count=1, parameters=head, flops=2.0 * width * vocab))
    return rows


def _norms(stack: Stack, layers: Sequence[str]) -> tuple[int, str]:
    """How many norms there are before the last one, and the last one's kind."""
    count = int(stack.norm.embedding)
    for layer in layers:
        branches = len(pattern.branches(layer))
        joined = branches if branches > 1 and stack.parallel.combine == "scaled_mean" else 0
        count += joined + (branches if stack.parallel.norms == "separate" else 1)
    return count, stack.norm.final or stack.norm.kind


def parameters(model: Mapping[str, Any]) -> dict[str, int]:
    """total: stored weights, a tied matrix once. active: used for one token. embedding: input matrix and untied head."""
    table = block_table(model, seq_len=1)
    total = sum(row.parameters for row in table)
    active = sum(row.parameters if row.active is None else row.active for row in table)
    stack = stack_of(model)
    matrices = 1 if stack.tie_embeddings else 2
    return {"total": total, "active": active, "embedding": matrices * model["vocab_size"] * stack.width}


def flops_per_token(model: Mapping[str, Any], seq_len: int) -> dict[str, float]:
    """Matrix products, scans and causal scores of one token in a sequence of seq_len; norms and activations are not counted."""
    forward = sum(row.flops for row in block_table(model, seq_len))
    return {"forward": forward, "train": TRAIN_PER_FORWARD * forward}


def kv_bytes_per_token(model: Mapping[str, Any], element_bytes: int = 2) -> int:
    """Decoding cache that grows by this much with every token of context."""
    return sum(row.kv_bytes for row in block_table(model, seq_len=1, element_bytes=element_bytes))


def state_bytes(model: Mapping[str, Any], element_bytes: int = 2) -> int:
    """Decoding cache of fixed size, per sequence."""
    return sum(row.state_bytes for row in block_table(model, seq_len=1, element_bytes=element_bytes))


def cache_bytes(model: Mapping[str, Any], context: int, element_bytes: int = 2) -> int:
    """The whole decoding cache of one sequence after `context` tokens."""
    width, layers = stack_of(model).width, model["pattern"]
    called = Counter(letter for layer in layers for letter in [*pattern.branches(layer), pattern.feeder(layer)])
    return sum(called[letter] * spec.cache_bytes(width, context, element_bytes) for letter, spec in specs_of(model).items())


def checkpoint_bytes(model: Mapping[str, Any]) -> dict[str, int]:
    """Bytes on disk in fp32. weights: 4 per parameter. full: 12, with both Adam moments."""
    count = parameters(model)["total"]
    return {"weights": 4 * count, "full": 12 * count}
