"""Exact parameters, FLOPs per token and bytes of a resolved model.

The model is the semantic block that zexp.blocks.resolve.resolve_model returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zexp.blocks import pattern
from zexp.blocks.base import FeederSpec
from zexp.blocks.resolve import Stack, specs_of, stack_of

TRAIN_PER_FORWARD = 3  # a backward pass is two forward passes; nothing is recomputed
RECOMPUTED_PER_FORWARD = 4  # with the forward pass computed again before it


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
    stack, vocab = stack_of(model), model["vocab_size"]
    width = stack.width
    head = 0 if stack.tie_embeddings else vocab * width
    rows = [Row(name="embedding", letter=None, count=1, parameters=vocab * width, flops=0.0)]
    for letter, spec in specs_of(model).items():
        if isinstance(spec, FeederSpec):
            count = counted(model, letter)
            parameters = spec.copies * spec.parameters(width) + count * spec.call_parameters(width)
            idle = 0
        else:
            count = counted(model, letter)
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
    norms, in_norms = norms_of(model)
    rows.append(Row(name="norms", letter=None, count=norms, parameters=in_norms, flops=0.0))
    rows.append(Row(name="head", letter=None, count=1, parameters=head, flops=2.0 * width * vocab))
    return rows


def counted(model: Mapping[str, Any], letter: str) -> int:
    """How many layers (or branches) of a letter there are, or calls of a feeder."""
    return sum(letter in pattern.branches(layer) or letter == pattern.feeder(layer) for layer in model["pattern"])


def norms_of(model: Mapping[str, Any]) -> tuple[int, int]:
    """How many norms stand outside the blocks, and their parameters."""
    stack = stack_of(model)
    before, final = _norms(stack, model["pattern"])
    vectors = {"rmsnorm": 1, "layernorm": 2}
    return before + 1, (before * vectors[stack.norm.kind] + vectors[final]) * stack.width


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
    recomputed = RECOMPUTED_PER_FORWARD * forward
    return {"forward": forward, "train": TRAIN_PER_FORWARD * forward, "train_recomputed": recomputed}


def decode_flops(model: Mapping[str, Any], context: int) -> float:
    """FLOPs of the token that makes the context that long."""
    width = stack_of(model).width
    blocks = sum(counted(model, letter) * spec.decode_flops(width, context) for letter, spec in specs_of(model).items())
    return blocks + 2.0 * width * model["vocab_size"]


def weights_read(model: Mapping[str, Any]) -> int:
    """Parameters that decoding one token reads: shared ones at each call, of the embedding one row, the head whole."""
    width = stack_of(model).width
    read = width * model["vocab_size"] + width + norms_of(model)[1]
    for letter, spec in specs_of(model).items():
        count = counted(model, letter)
        read += count * spec.active_parameters(width) - spec.missing_in_first(width)
        if isinstance(spec, FeederSpec):
            read += count * spec.call_parameters(width)
    return read


def kv_bytes_per_token(model: Mapping[str, Any], element_bytes: int = 2) -> int:
    """Decoding cache that grows by this much with every token of context."""
    return sum(row.kv_bytes for row in block_table(model, seq_len=1, element_bytes=element_bytes))


def state_bytes(model: Mapping[str, Any], element_bytes: int = 2) -> int:
    """Decoding cache of fixed size, per sequence."""
    return sum(row.state_bytes for row in block_table(model, seq_len=1, element_bytes=element_bytes))


def cache_bytes(model: Mapping[str, Any], context: int, element_bytes: int = 2) -> int:
    """The whole decoding cache of one sequence after `context` tokens."""
    width = stack_of(model).width
    return sum(
        counted(model, letter) * spec.cache_bytes(width, context, element_bytes) for letter, spec in specs_of(model).items()
    )


def checkpoint_bytes(model: Mapping[str, Any]) -> dict[str, int]:
    """Bytes on disk in fp32. weights: 4 per parameter. full: 12, with both Adam moments."""
    count = parameters(model)["total"]
    return {"weights": 4 * count, "full": 12 * count}
