"""mLSTM: keys, legality, formulas.

H heads · N key width of a head · P value width of a head · K all heads' keys (H·N) · I all heads' values (H·P) · Q chunk ·
D model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from zexp.blocks.base import BlockSpec, Role, scan_bytes, unit_problems


@dataclass(frozen=True, kw_only=True)
class Spec(BlockSpec):
    """mLSTM (Beck et al. 2024, arXiv:2405.04517, section 2.3) in the block of xLSTM-7B (arXiv:2503.13427, section 3).

    heads: H. qk_factor, value_factor: K / D and I / D, the projection factors; the first paper's block, which projects
    up by 2 before the cell, is value_factor 2 without its convolution and skip, which xLSTM-7B dropped.
    gate_softcap: c, the input and forget gates' preactivations become c · tanh(x / c); null = not.
    input_bias: what the input gates' biases start at. They are exponents: -10 keeps early gradients small.
    The denominator's floor of 1e-6 is transformers' and no key.
    chunk: Q, tokens per block of the chunked algorithm; it changes speed and last bits only.
    """

    ROLE: ClassVar[Role] = "mixer"
    NAME: ClassVar[str] = "mlstm"
    NUMERICS: ClassVar[dict[str, int]] = {"block.mlstm": 1, "kernel.head_norm": 1, "kernel.mlstm": 1}

    SCALED_HEADS: ClassVar[tuple[str, ...]] = ("heads",)

    heads: int
    qk_factor: float = 0.5
    value_factor: float = 1.0
    gate_softcap: float | None = 15.0
    input_bias: float = -10.0
    chunk: int = 64

    def keys(self, width: int) -> int:
        """K."""
        return round(self.qk_factor * width)

    def values(self, width: int) -> int:
        """I."""
        return round(self.value_factor * width)

    def problems(self, width: int, where: str) -> list[str]:
        found = unit_problems({"heads": self.heads, "chunk": self.chunk}, where)
        if self.gate_softcap is not None and self.gate_softcap <= 0:
            found.append(f"{where}.gate_softcap = {self.gate_softcap}: it must be above 0, or null for none.")
        for key in ("qk_factor", "value_factor"):
            factor = getattr(self, key)
            inner = factor * width
            if factor <= 0:
                found.append(f"{where}.{key} = {factor}: it must be above 0.")
            elif self.heads > 0 and (
                round(inner) < 1 or not math.isclose(inner, round(inner), abs_tol=1e-6) or round(inner) % self.heads
            ):
                found.append(
                    f"{where}.{key} = {factor}: {inner:g} channels ({factor:g} × width {width}) cannot be cut into "
                    f"{self.heads} heads.\n  Choose a multiple of {self.heads / width:g}, or a number of heads "
                    f"that divides both factors' channels."
                )
        return found

    def parameters(self, width: int) -> int:
        keys, values = self.keys(width), self.values(width)
        gates = 2 * self.heads * (width + 1)
        return width * (2 * keys + 2 * values) + gates + values + values * width

    def tensor_divides(self, width: int) -> dict[str, int] | None:
        return {"heads": self.heads}

    def tensor_parameters(self, width: int, degree: int) -> int:
        return self.parameters(width) // degree

    def decode_flops(self, width: int, context: int) -> float:
        # Forgetting, writing (two) and reading (two) the memory and the normaliser.
        state = self.keys(width) // self.heads * (self.values(width) + self.heads)
        return self.matmul_flops(width) + 5 * state

    def flops(self, width: int, seq_len: int) -> float:
        q, keys = min(self.chunk, seq_len), self.keys(width)
        values = self.values(width) + self.heads  # the normaliser is one more channel a head
        state = keys * values // self.heads  # N (P + 1), all heads
        # Scores and reading them within the chunk; reading a state, writing one and carrying it on.
        scan = 2 * q * keys + 2 * q * values + 4 * state + 2 * state / q
        return self.matmul_flops(width) + scan

    def matmul_flops(self, width: int) -> float:
        return 2 * width * (2 * self.keys(width) + 3 * self.values(width) + 2 * self.heads)

    def saved_elements(self, width: int, seq_len: int) -> float:
        keys, values = self.keys(width), self.values(width)
        projected = 2 * keys + 2 * values
        # Capped gates and, with a cap, its tanh; the forget gates' logarithm and its buffer.
        gates = self.heads * (6 if self.gate_softcap is not None else 4)
        states = (math.ceil(seq_len / self.chunk) - 1) * self._state(width) / seq_len
        # Two inverse denominators a head; the cell's output; two numbers a head of its norm; the gated norm.
        return width + projected + gates + states + 2 * self.heads + values + 2 * self.heads + values

    def state_bytes(self, width: int, element_bytes: int) -> int:
        return self._state(width) * scan_bytes(element_bytes)

    def _state(self, width: int) -> int:
        """Numbers of memory, normaliser and stabiliser."""
        keys = self.keys(width)
        return keys * self.values(width) // self.heads + keys + self.heads
