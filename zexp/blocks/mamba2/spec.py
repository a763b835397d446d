"""Mamba2: keys, legality, formulas.

I inner width · H heads · P head width · N state size · G groups · K conv width · Q chunk · D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zexp.blocks.base import BlockSpec, Role, scan_bytes, unit_problems
from zexp.config.identity import semantic


@dataclass(frozen=True, kw_only=True)
class Spec(BlockSpec):
    """Mamba-2 (Dao & Gu 2024, arXiv:2405.21060), with the block of its section 7.

    expand: inner width / model width. state_size: N per head. head_dim: P. groups: G sets of B and C, each shared
    by H / G heads. conv_width: K, positions the causal convolution sees, itself included.
    chunk: Q, tokens per block of the chunked algorithm; it changes speed and last bits only.
    dt_min, dt_max: what dt is clamped to after its softplus; null = not (the published models in the vendor's code).
    norm_before_gate: norm(y) · silu(z) instead of norm(y · silu(z)).
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
    dt_min: float | None = semantic(None, absent=None)
    dt_max: float | None = semantic(None, absent=None)
    norm_before_gate: bool = semantic(False, absent=False)

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
        if self.dt_min is not None and self.dt_min < 0:
            found.append(f"{where}.dt_min = {self.dt_min}: time steps are positive; choose 0 or more, or null.")
        if self.dt_max is not None and self.dt_max <= (self.dt_min or 0):
            found.append(
                f"{where}.dt_max = {self.dt_max}: it must be above dt_min ({self.dt_min or 0}), or null for none."
            )
        return found

    def parameters(self, width: int) -> int:
        inner, heads, channels = self.inner(width), self.heads(width), self.conv_channels(width)
        in_proj = width * (inner + channels + heads)
        conv = channels * self.conv_width + channels
        return in_proj + conv + 3 * heads + inner + inner * width

    def flops(self, width: int, seq_len: int) -> float:
        inner, channels = self.inner(width), self.conv_channels(width)
        q, n, g = min(self.chunk, seq_len), self.state_size, self.groups
        scan = 2 * q * n * g + 2 * q * inner + 4 * n * inner + 2 * n * inner / q
        return self.matmul_flops(width) + 2 * self.conv_width * channels + scan

    def decode_flops(self, width: int, context: int) -> float:
        # Forgetting, writing (two) and reading (two) the state.
        conv = 2 * self.conv_width * self.conv_channels(width)
        return self.matmul_flops(width) + conv + 5 * self.inner(width) * self.state_size

    def matmul_flops(self, width: int) -> float:
        inner, heads, channels = self.inner(width), self.heads(width), self.conv_channels(width)
        return 2 * width * (inner + channels + heads) + 2 * inner * width

    def tensor_divides(self, width: int) -> dict[str, int] | None:
        return {"heads": self.heads(width)}

    def tensor_parameters(self, width: int, degree: int) -> int:
        # Heads are cut; B and C too where their groups can be, else every device has them whole (mamba-ssm cuts the same).
        inner, heads = self.inner(width), self.heads(width)
        shared = 2 * self.groups * self.state_size
        shared = shared // degree if self.groups % degree == 0 else shared
        channels = inner // degree + shared
        in_proj = width * ((inner + heads) // degree + channels)
        return in_proj + channels * (self.conv_width + 1) + (3 * heads + inner + inner * width) // degree

    def saved_elements(self, width: int, seq_len: int) -> float:
        inner, heads, channels = self.inner(width), self.heads(width), self.conv_channels(width)
        q, shared = min(self.chunk, seq_len), self.groups * self.state_size
        convolved = 3 * channels  # before it, its sigmoid, after it
        # Summed decays, entry and exit weights; states; scores; y. All of whole chunks, to which the inputs are copied.
        padded = -(-seq_len // q) * q / seq_len
        copies = inner + 2 * shared + heads if padded > 1 else 0
        scan = padded * (3 * heads + self.state_size * inner / q + self.groups * q + inner + copies)
        steps = (2 if padded > 1 else 3) * heads  # dt before and after its softplus and with its bias
        clamped = heads * (self.dt_min is not None or self.dt_max is not None)
        # z, its sigmoid (or silu, and the norm's halves), the normed, and what the last matrix reads.
        gated = (5 if self.norm_before_gate else 4) * inner + self.groups
        return width + convolved + scan + steps + clamped + gated

    def state_bytes(self, width: int, element_bytes: int) -> int:
        convolved = self.conv_channels(width) * self.conv_width
        return self.inner(width) * self.state_size * scan_bytes(element_bytes) + convolved * element_bytes
