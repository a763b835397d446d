"""Retention: keys, legality, formulas.

H heads · N key width of a head · P value width of a head · I value width of all heads · Q chunk · D model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from zexp.blocks.base import BlockSpec, Role, scan_bytes, unit_problems


@dataclass(frozen=True, kw_only=True)
class Spec(BlockSpec):
    """Multi-scale retention of RetNet (Sun et al. 2023, arXiv:2307.08621, section 2.2), with flash-linear-attention's norm.

    heads: H; queries and keys have D / H channels each. value_expansion: value width / model width.
    rope_theta: base of the rotary positions of queries and keys; null = none.
    first_decay, last_decay: head h forgets with gamma = 1 - 2^-e, where e goes evenly from the first to the last head's.
    The default is 5 + h, so null = first_decay + H - 1 (eq. 8); 5 and 9 are gamma = 1 - 1/32 .. 1 - 1/512.
    gate: silu(W_G x) times the normed output. The norm is an RMSNorm of each head, with one weight a channel of a head
    that all heads share.
    chunk: Q, tokens per block of the chunked algorithm; it changes speed and last bits only.
    """

    ROLE: ClassVar[Role] = "mixer"
    NAME: ClassVar[str] = "retention"
    NUMERICS: ClassVar[dict[str, int]] = {
        "block.retention": 1,
        "kernel.head_norm": 1,
        "kernel.retention": 1,
        "kernel.rotary": 1,
    }

    SCALED_HEADS: ClassVar[tuple[str, ...]] = ("heads",)

    heads: int
    value_expansion: float = 2.0
    rope_theta: float | None = 10000.0
    first_decay: float = 5.0
    last_decay: float | None = None
    gate: bool = True
    chunk: int = 64

    def completed(self, width: int) -> Spec:
        return self if self.last_decay is not None else replace(self, last_decay=self.first_decay + self.heads - 1)

    def values(self, width: int) -> int:
        """I."""
        return round(self.value_expansion * width)

    @property
    def log_decays(self) -> tuple[float, ...]:
        """log gamma of each head; the spec must be completed."""
        assert self.last_decay is not None, "the spec must be completed"
        step = (self.last_decay - self.first_decay) / max(self.heads - 1, 1)
        return tuple(math.log1p(-(2.0 ** -(self.first_decay + head * step))) for head in range(self.heads))

    def problems(self, width: int, where: str) -> list[str]:
        found = unit_problems({"heads": self.heads, "chunk": self.chunk}, where)
        if self.value_expansion <= 0:
            found.append(f"{where}.value_expansion = {self.value_expansion}: it must be above 0.")
        if self.rope_theta is not None and self.rope_theta <= 0:
            found.append(f"{where}.rope_theta = {self.rope_theta}: it must be above 0, or null for no positions.")
        for key in ("first_decay", "last_decay"):
            value = getattr(self, key)
            if value is not None and not 0 < 2.0**-value < 1:
                found.append(
                    f"{where}.{key} = {value}: gamma = 1 - 2^-{value:g} must be above 0 and below 1.\n"
                    "  Choose more than 0; heads that hardly forget have 9 to 16."
                )
        if self.heads == 1 and self.last_decay not in (None, self.first_decay):
            found.append(
                f"{where}.last_decay = {self.last_decay}: the one head there is has first_decay = {self.first_decay}.\n"
                "  Leave last_decay out, or choose more heads."
            )
        if found:
            return found
        if width % self.heads:
            found.append(
                f"{where}.heads = {self.heads}: the width {width} cannot be cut into {self.heads} heads.\n"
                f"  Choose a divisor of {width}."
            )
        elif self.rope_theta is not None and width // self.heads % 2:
            found.append(
                f"{where}.rope_theta = {self.rope_theta}: rotary positions turn pairs of channels, and a head has "
                f"{width // self.heads}.\n  Choose a number of heads that leaves an even width, or rope_theta null."
            )
        inner = self.value_expansion * width
        if round(inner) < 1 or not math.isclose(inner, round(inner), abs_tol=1e-6) or round(inner) % self.heads:
            found.append(
                f"{where}.value_expansion = {self.value_expansion}: a value width of {inner:g} ({self.value_expansion:g} × "
                f"width {width}) cannot be cut into {self.heads} heads.\n"
                f"  Choose a multiple of {self.heads / width:g}."
            )
        return found

    def parameters(self, width: int) -> int:
        inner = self.values(width)
        return 2 * width * width + (3 if self.gate else 2) * inner * width + inner // self.heads

    def tensor_divides(self, width: int) -> dict[str, int] | None:
        return {"heads": self.heads}

    def tensor_parameters(self, width: int, degree: int) -> int:
        whole = self.values(width) // self.heads  # the norm's weight, which all heads share
        return (self.parameters(width) - whole) // degree + whole

    def decode_flops(self, width: int, context: int) -> float:
        # Forgetting, writing (two) and reading (two) the state.
        return self.matmul_flops(width) + 5 * (width // self.heads) * self.values(width)

    def flops(self, width: int, seq_len: int) -> float:
        q, inner = min(self.chunk, seq_len), self.values(width)
        state = width // self.heads * inner  # N P, all heads
        # Scores and reading them within the chunk; reading a state, writing one and carrying it on.
        scan = 2 * q * width + 2 * q * inner + 4 * state + 2 * state / q
        return self.matmul_flops(width) + scan

    def matmul_flops(self, width: int) -> float:
        return 2 * width * (2 * width + (3 if self.gate else 2) * self.values(width))

    def saved_elements(self, width: int, seq_len: int) -> float:
        inner = self.values(width)
        projected = 2 * width + (2 if self.gate else 1) * inner
        states = (math.ceil(seq_len / self.chunk) - 1) * (width // self.heads) * inner / seq_len
        turned = 0 if self.rope_theta is None else 2 * width + width / self.heads  # queries, keys; cos and sin
        # The normed input, retention's output, one number a head, the gated norm.
        return width + projected + turned + states + inner + self.heads + inner

    def state_bytes(self, width: int, element_bytes: int) -> int:
        return width // self.heads * self.values(width) * scan_bytes(element_bytes)
