"""Mamba2: keys, legality, formulas.

I inner width · H heads · P head width · N state size · G groups · K conv width · Q chunk · D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zexp.blocks.base import BlockSpec, Role, unit_problems


@dataclass(frozen=True, kw_only=True)
class Spec(BlockSpec):
    """Mamba-2 (Dao & Gu 2024, arXiv:2405.21060), with the block of its section 7.

    expand: inner width / model width. state_size: N per head. head_dim: P. groups: G sets of B and C, each shared
    by H / G heads. conv_width: K, positions the causal convolution sees, itself included.
    chunk: Q, tokens per block of the chunked algorithm; it changes speed and last bits only.
    dt is not clamped after its softplus.
    """

    ROLE: ClassVar[Role] = "mixer"
    NAME: ClassVar[str] = "mamba2"
    NUMERICS: ClassVar[dict[str, int]] = {
        "block.mamba2": 1,
        "kernel.causal_conv1d": 1,
        "kernel.gated_norm": 1,
        "kernel.ssd": 1,
    }

    expand: int = 2
    state_size: int = 128
    head_dim: int = 64
    groups: int = 1
    conv_width: int = 4
    chunk: int = 256

    def inner(self, width: int) -> int:
        return self.expand * width

    def heads(self, width: int) -> int:
        return self.inner(width) // self.head_dim

    def conv_channels(self, width: int) -> int:
        """Channels that pass the convolution: x, B and C."""
        return self.inner(width) + 2 * self.groups * self.state_size

    def problems(self, width: int, where: str) -> list[str]:
        sizes = ("expand", "state_size", "head_dim", "groups", "conv_width", "chunk")
        found = unit_problems({key: getattr(self, key) for key in sizes}, where)
        if found:
            return found
        inner = self.inner(width)
        if inner % self.head_dim:
            found.append(
                f"{where}.head_dim = {self.head_dim}: the inner width {inner} (expand {self.expand} × width {width}) "
                f"cannot be cut into heads of {self.head_dim}.\n  Choose a divisor of {inner}."
            )
        elif self.heads(width) % self.groups:
            found.append(
                f"{where}.groups = {self.groups}: {self.heads(width)} heads cannot be shared evenly by {self.groups} "
                f"groups.\n  Choose a divisor of {self.heads(width)}."
            )
        return found

    def parameters(self, width: int) -> int:
        inner, heads, channels = self.inner(width), self.heads(width), self.conv_channels(width)
        in_proj = width * (inner + channels + heads)
        conv = channels * self.conv_width + channels
        return in_proj + conv + 3 * heads + inner + inner * width

    def flops(self, width: int, seq_len: int) -> float:
        inner, heads, channels = self.inner(width), self.heads(width), self.conv_channels(width)
        q, n, g = min(self.chunk, seq_len), self.state_size, self.groups
        scan = 2 * q * n * g + 2 * q * inner + 4 * n * inner + 2 * n * inner / q
        return 2 * width * (inner + channels + heads) + 2 * self.conv_width * channels + scan + 2 * inner * width

    def state_bytes(self, width: int, element_bytes: int) -> int:
        return (self.inner(width) * self.state_size + self.conv_channels(width) * self.conv_width) * element_bytes
