"""Gated DeltaNet: keys, legality, formulas.

G key heads · N key width of a head · H value heads · P value width of a head · I value width of all heads (H·P)
K conv width · Q chunk · D model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from zexp.blocks.base import BlockSpec, Role, scan_bytes, unit_problems


@dataclass(frozen=True, kw_only=True)
class Spec(BlockSpec):
    """Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464, section 3.4), as in Qwen3-Next and OLMo-Hybrid.

    key_heads: G, heads of queries and keys. value_heads: H, a multiple of G; each key head serves H / G of them;
    null = key_heads.
    key_head_dim: N, null = 3 D / (4 G), rounded down. value_head_dim: P, null = 2 N. (OLMo-Hybrid's sizes.)
    conv_width: K, positions the causal convolution of queries, keys and values sees, itself included.
    output_gate: silu of a further matrix of the input, times the normed output. The norm is an RMSNorm of each value
    head, with one weight a channel of a head that all heads share.
    negative_eigenvalues: beta in (0, 2) instead of (0, 1), so that a state can change its sign along a key
    (Grazzi et al. 2024, arXiv:2411.12537).
    chunk: Q, tokens per block of the chunked algorithm; it changes speed and last bits only.
    """

    ROLE: ClassVar[Role] = "mixer"
    NAME: ClassVar[str] = "gated_deltanet"
    NUMERICS: ClassVar[dict[str, int]] = {
        "block.gated_deltanet": 1,
        "kernel.causal_conv1d": 1,
        "kernel.gated_delta": 1,
        "kernel.head_norm": 1,
    }
    SCALED_HEADS: ClassVar[tuple[str, ...]] = ("key_heads", "value_heads")
    BF16_SAVED: ClassVar[float] = 3.6

    key_heads: int
    value_heads: int | None = None
    key_head_dim: int | None = None
    value_head_dim: int | None = None
    conv_width: int = 4
    output_gate: bool = True
    negative_eigenvalues: bool = False
    chunk: int = 64

    def completed(self, width: int) -> Spec:
        keys = 3 * width // (4 * max(self.key_heads, 1)) if self.key_head_dim is None else self.key_head_dim
        return replace(
            self,
            value_heads=self.key_heads if self.value_heads is None else self.value_heads,
            key_head_dim=keys,
            value_head_dim=2 * keys if self.value_head_dim is None else self.value_head_dim,
        )

    def sizes(self, width: int) -> tuple[int, int, int, int]:
        """G, N, H, P."""
        full = self.completed(width)
        assert full.value_heads is not None and full.key_head_dim is not None and full.value_head_dim is not None
        return full.key_heads, full.key_head_dim, full.value_heads, full.value_head_dim

    def splits(self, width: int) -> tuple[int, int, int, int]:
        """Columns of the matrix that reads the input: queries, keys and values; the gate; what becomes the decay; beta."""
        groups, keys, heads, values = self.sizes(width)
        return 2 * groups * keys + heads * values, self.output_gate * heads * values, heads, heads

    def problems(self, width: int, where: str) -> list[str]:
        keys = ("key_heads", "value_heads", "key_head_dim", "value_head_dim", "conv_width", "chunk")
        sizes = {key: getattr(self, key) for key in keys}
        found = unit_problems({key: size for key, size in sizes.items() if size is not None}, where)
        if found:
            return found
        groups, key_head_dim, heads, _ = self.sizes(width)
        if key_head_dim < 1:
            found.append(
                f"{where}.key_heads = {groups}: three quarters of the width {width} leave no channel for {groups} heads.\n"
                f"  Choose fewer heads, or set {where}.key_head_dim."
            )
        if heads % groups:
            found.append(
                f"{where}.value_heads = {heads}: {groups} key heads cannot serve {heads} value heads evenly.\n"
                f"  Choose a multiple of {groups}."
            )
        return found

    def parameters(self, width: int) -> int:
        _, _, heads, values = self.sizes(width)
        conv = self.splits(width)[0] * self.conv_width
        # Decay rates and their biases, one a head; the norm.
        return width * sum(self.splits(width)) + conv + 2 * heads + values + heads * values * width

    def flops(self, width: int, seq_len: int) -> float:
        groups, keys, heads, values = self.sizes(width)
        q = min(self.chunk, seq_len)
        # <k, k> and <q, k>; the triangular inverse; what it and the reads within the chunk are multiplied with.
        inside = 4 * q * groups * keys + heads * q * q / 3 + 4 * q * heads * values
        state = heads * keys * values
        # What the state holds for keys and for queries, writing to it; carrying it on.
        between = 6 * state + 2 * state / q
        return self.matmul_flops(width) + 2 * self.conv_width * self.splits(width)[0] + inside + between

    def decode_flops(self, width: int, context: int) -> float:
        # Forgetting, what the state holds for the key (two), writing (two) and reading (two).
        _, keys, heads, values = self.sizes(width)
        conv = 2 * self.conv_width * self.splits(width)[0]
        return self.matmul_flops(width) + conv + 7 * heads * keys * values

    def matmul_flops(self, width: int) -> float:
        _, _, heads, values = self.sizes(width)
        return 2 * width * (sum(self.splits(width)) + heads * values)

    def tensor_divides(self, width: int) -> dict[str, int] | None:
        return {"key_heads": self.key_heads}

    def tensor_parameters(self, width: int, degree: int) -> int:
        whole = self.sizes(width)[3]  # the norm's weight, which all heads share
        return (self.parameters(width) - whole) // degree + whole

    def saved_elements(self, width: int, seq_len: int) -> float:
        _, keys, heads, values = self.sizes(width)
        inner = heads * values
        convolved = 3 * self.splits(width)[0]  # before it, its sigmoid, after it
        states = (math.ceil(seq_len / self.chunk) - 1) * heads * keys * values / seq_len
        # The decay's input with its bias, its softplus and their product with the rate; beta, and before its factor 2.
        rates = (4 + self.negative_eigenvalues) * heads
        # The gate, the delta rule's outputs, one number a head, the gated norm.
        out = self.output_gate * inner + inner + heads + inner
        return width + convolved + states + rates + out

    def state_bytes(self, width: int, element_bytes: int) -> int:
        _, keys, heads, values = self.sizes(width)
        convolved = self.splits(width)[0] * self.conv_width
        return heads * keys * values * scan_bytes(element_bytes) + convolved * element_bytes
