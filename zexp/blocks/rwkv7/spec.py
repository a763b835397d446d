"""RWKV-7's time mix: keys, legality, formulas. D model width · H heads · N head width · Q chunk · s sequence length."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from zexp.blocks.base import BlockSpec, Role, scan_bytes, unit_problems
from zexp.kernels.wkv7.chunk import CHUNK


@dataclass(frozen=True, kw_only=True)
class LoraRank:
    """Inner width of the pairs of narrow matrices that make a vector a position (the paper's loramlp).

    decay: w. rate: the in-context learning rate a. value: how much of the first layer's values replaces the layer's own.
    gate: g. The defaults are RWKV-7-168M's.
    """

    decay: int = 64
    rate: int = 64
    value: int = 32
    gate: int = 128


@dataclass(frozen=True, kw_only=True)
class Spec(BlockSpec):
    """The time mix of RWKV-7 (Peng et al. 2025, arXiv:2503.14456, section 4): a state per head that each position decays
    per channel, removes from along one direction, and writes to.

    head_dim: N, keys and values alike. lora_rank: see LoraRank.
    The first layer of a model has no value residual; it leaves its values to the others.
    """

    ROLE: ClassVar[Role] = "mixer"
    NAME: ClassVar[str] = "rwkv7"
    NUMERICS: ClassVar[dict[str, int]] = {
        "block.rwkv7": 1,
        "kernel.rwkv7_keys": 1,
        "kernel.rwkv7_out": 1,
        "kernel.token_shift": 1,
        "kernel.wkv7": 1,
    }

    BF16_SAVED: ClassVar[float] = 3.3

    head_dim: int = 64
    lora_rank: LoraRank = field(default_factory=LoraRank)

    def heads(self, width: int) -> int:
        return width // self.head_dim

    @property
    def ranks(self) -> int:
        """All narrow widths together."""
        return self.lora_rank.decay + self.lora_rank.rate + self.lora_rank.value + self.lora_rank.gate

    def problems(self, width: int, where: str) -> list[str]:
        found = unit_problems({"head_dim": self.head_dim}, where)
        ranks = {key: getattr(self.lora_rank, key) for key in ("decay", "rate", "value", "gate")}
        found += unit_problems(ranks, f"{where}.lora_rank")
        if self.head_dim >= 1 and width % self.head_dim:
            found.append(
                f"{where}.head_dim = {self.head_dim}: the width {width} cannot be cut into heads of {self.head_dim}.\n"
                f"  Choose a divisor of {width}."
            )
        return found

    def parameters(self, width: int) -> int:
        # Vectors: 6 mixes, 3 biases of narrow pairs (the gate has none), k_k, k_a, r_k, the norm's weight and bias.
        return 4 * width * width + 2 * width * self.ranks + 14 * width

    def missing_in_first(self, width: int) -> int:
        return 2 * width * self.lora_rank.value + width

    def flops(self, width: int, seq_len: int) -> float:
        n, q = self.head_dim, min(CHUNK, seq_len)
        # Multiply-adds a head: in the chunk, with its state, from state to state, the triangular inverse.
        scan = 10 * q * n + 4 * n * n + n**3 / q + q * q / 3
        return self.matmul_flops(width) + 2 * self.heads(width) * scan

    def decode_flops(self, width: int, context: int) -> float:
        # Forgetting (one), removing (a product with the state and an outer one), writing and reading it (two each).
        return self.matmul_flops(width) + 9 * width * self.head_dim

    def matmul_flops(self, width: int) -> float:
        return 2 * (4 * width * width + 2 * width * self.ranks)

    def saved_elements(self, width: int, seq_len: int) -> float:
        shifted = 7 * width  # the input and its six mixes
        scan = 7 * width  # r, w, both keys and the one that they are made of, a, v
        states = width * self.head_dim / min(CHUNK, seq_len)
        residual = 2 * width  # the first layer's values less the own ones, and their share
        out = 3 * width  # read from the state, gate, output
        return shifted + scan + states + residual + out + self.ranks + 4 * self.heads(width)

    def state_bytes(self, width: int, element_bytes: int) -> int:
        return width * self.head_dim * scan_bytes(element_bytes) + width * element_bytes
