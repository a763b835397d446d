"""Bytes that training takes on each device, and decoding on one.

Of training: weights, gradients, optimizer and what the forward pass keeps for the backward pass. Not counted: the
framework itself, communication buffers, and what lives within one operation alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from zexp.blocks import pattern
from zexp.blocks.base import BlockSpec, FeederSpec
from zexp.blocks.resolve import Stack, specs_of, stack_of
from zexp.calc.layout import AUTO, Layout
from zexp.calc.model import cache_bytes, counted, decode_flops, norms_of, parameters, weights_read

# Bytes a parameter: (weights that products read, gradient, optimizer). AdamW has two moments in fp32; under bf16 the weights
# in fp32 belong to the optimizer, and the products read a copy in bf16.
PER_PARAMETER = {"fp32": (4, 4, 8), "bf16": (2, 4, 12)}
FULL = 0.9  # of a device's memory: what is not counted (framework, buffers) takes the rest
CONTEXTS = (2048, 8192, 32768, 131072)


@dataclass(frozen=True, kw_only=True)
class Training:
    """Bytes on each device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def to_json(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def training(
    model: Mapping[str, Any], layout: Layout, *, seq_len: int, micro_batch: int, precision: str
) -> Training:
    """Of one optimizer step with AdamW. micro_batch: sequences that each copy of the model reads at a time.
    """
    weight, gradient, moments = PER_PARAMETER[precision]
    dense, experts = parameters_per_device(model, layout)

    def shared_out(size: int, stage: int) -> int:
        """A size a parameter, divided among the copies from that ZeRO stage on; experts have fewer copies."""
        if layout.zero < stage:
            return size * (dense + experts)
        return -(-size * dense // layout.data) + -(-size * experts * layout.expert // layout.data)

    tokens = micro_batch * seq_len
    kept = activation_bytes(model, layout, seq_len=seq_len, precision=precision)
    return Training(
        weights=shared_out(weight, 3),
        gradients=shared_out(gradient, 2),
        optimizer=shared_out(moments, 1),
        activations=round(tokens * kept),
    )


def checkpointing(
    setting: str, model: Mapping[str, Any], layout: Layout, *, seq_len: int, micro_batch: int, precision: str, room: int | None
) -> str:
    """none or full. setting: one of them, or auto: full where a training without it would exceed what is to be FULL of the room.

    room: bytes for the training; None = not known, and auto is none then.
    """
    if setting != AUTO:
        return setting
    if room is None:
        return "none"
    alone = replace(layout, checkpointing="none")
    taken = training(model, alone, seq_len=seq_len, micro_batch=micro_batch, precision=precision).total
    return "full" if taken > FULL * room else "none"


def parameters_per_device(model: Mapping[str, Any], layout: Layout) -> tuple[int, int]:
    """Parameters that a device computes with before ZeRO shares them out: all but experts, and experts."""
    stack, vocab, degree = stack_of(model), model["vocab_size"], layout.tensor
    width = stack.width
    matrices = 1 if stack.tie_embeddings else 2
    dense = matrices * -(-vocab // degree) * width + norms_of(model)[1]  # the vocabulary is cut into rows
    experts = 0
    for letter, spec in specs_of(model).items():
        count = counted(model, letter)
        if isinstance(spec, FeederSpec):
            dense += spec.copies * spec.tensor_parameters(width, degree)
            dense += count * spec.call_tensor_parameters(width, degree)
            continue
        spread = spec.expert_parameters(width)
        experts += count * spread // (degree * layout.expert)
        dense += count * (spec.tensor_parameters(width, degree) - spread // degree) - spec.missing_in_first(width)
    return dense, experts


def activation_bytes(model: Mapping[str, Any], layout: Layout, *, seq_len: int, precision: str) -> float:
    """Bytes a token that a device keeps between the passes."""
    stack, specs = stack_of(model), specs_of(model)
    layers = [_kept_by_layer(layer, stack, specs, layout, seq_len, precision) for layer in model["pattern"]]
    # The residual stream and what is kept of norms are in fp32. After the layers: the last norm's input, and the gradient of
    # its output, which the loss computes in the forward pass.
    around = 4 * (2 * stack.width + 1) + stack.norm.embedding * 4 * (stack.width + 1)
    if layout.checkpointing == "full":
        inputs = 4 * stack.width * len(layers)
        embedded = 4 * stack.width * any(pattern.feeder(layer) for layer in model["pattern"])
        return inputs + embedded + max(layers) + around
    return sum(layers) + around


def saved_bytes(spec: BlockSpec, width: int, seq_len: int, precision: str, degree: int = 1) -> float:
    """Bytes a token that one layer or call of a block keeps on one of `degree` tensor-parallel devices."""
    whole = spec.saved_whole(width) if degree > 1 else 0.0
    elements = whole + (spec.saved_elements(width, seq_len) - whole) / degree
    return elements * (4.0 if precision == "fp32" else spec.BF16_SAVED)


def _kept_by_layer(
    layer: str, stack: Stack, specs: Mapping[str, BlockSpec], layout: Layout, seq_len: int, precision: str
) -> float:
    width, letters, feeder = stack.width, pattern.branches(layer), pattern.feeder(layer)
    separate = stack.parallel.norms == "separate"
    kept = 4.0 * (width + (len(letters) if separate else 1))  # the norm's input and a number a norm
    kept += sum(saved_bytes(specs[letter], width, seq_len, precision, layout.tensor) for letter in letters)
    if precision == "fp32" and not separate:
        kept -= 4.0 * width * (len(letters) - 1)  # branches read one normed input
    if len(letters) > 1 and stack.parallel.combine == "scaled_mean":
        kept += 4.0 * (width + 1) * len(letters)
    if feeder is not None:
        kept += saved_bytes(specs[feeder], width, seq_len, precision, layout.tensor)
    return kept


def inference(model: Mapping[str, Any], seq_len: int, element_bytes: int = 2) -> list[dict[str, float]]:
    """Of decoding one sequence, one row for every length of context, seq_len among them.

    context: tokens. cache, total: bytes of the cache, and with the weights. flops, bytes: of one further token: what is
    computed, and what is read at least (every weight that it is computed with, a shared one at each call, and the cache).
    """
    weights = element_bytes * parameters(model)["total"]
    rows = []
    for context in sorted({seq_len, *CONTEXTS}):
        cache = cache_bytes(model, context, element_bytes)
        rows.append(
            {
                "context": context,
                "cache": cache,
                "total": weights + cache,
                "flops": decode_flops(model, context),
                "bytes": element_bytes * weights_read(model) + cache,
            }
        )
    return rows
