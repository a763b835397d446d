"""Mamba1: keys, legality, formulas.

I inner width · N state size · K conv width · R rank of dt · H heads · D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from zexp.blocks.base import BlockSpec, Role, scan_bytes, unit_problems
from zexp.kernels.selective_scan.sizes import CHUNK


@dataclass(frozen=True, kw_only=True)
class Spec(BlockSpec):
    """Mamba (Gu & Dao 2023, arXiv:2312.00752), the block of its section 3.4.

    expand: inner width / model width. state_size: N per channel. conv_width: K, positions the causal convolution sees,
    itself included. dt_rank: R of the low-rank map to a step size per channel; null = ceil(width / 16).
    heads: parts of the inner channels with x_proj and dt_proj, and so B, C and steps, of their own (Zamba-7B: 2,
    arXiv:2405.16712). inner_norms: RMSNorm of the low-rank dt, of B and of C, with weights that heads share (Jamba,
    arXiv:2403.19887). conv_bias: of the convolution. bias: of the projections from and to the residual stream.
    """

    ROLE: ClassVar[Role] = "mixer"
    NAME: ClassVar[str] = "mamba1"
    NUMERICS: ClassVar[dict[str, int]] = {
        "block.mamba1": 1,
        "kernel.causal_conv1d": 1,
        "kernel.rms_norm": 1,
        "kernel.selective_scan": 1,
    }

    expand: int = 2
    state_size: int = 16
    conv_width: int = 4
    dt_rank: int | None = None
    heads: int = 1
    inner_norms: bool = False
    conv_bias: bool = True
    bias: bool = False

    def completed(self, width: int) -> Spec:
        return replace(self, dt_rank=self.rank(width))

    def inner(self, width: int) -> int:
        return self.expand * width

    def rank(self, width: int) -> int:
        return -(-width // 16) if self.dt_rank is None else self.dt_rank

    def problems(self, width: int, where: str) -> list[str]:
        sizes = {key: getattr(self, key) for key in ("expand", "state_size", "conv_width", "heads")}
        found = unit_problems(sizes | {"dt_rank": self.rank(width)}, where)
        if not found and self.inner(width) % self.heads:
            found.append(
                f"{where}.heads = {self.heads}: the inner width {self.inner(width)} (expand {self.expand} × width {width}) "
                f"cannot be cut into {self.heads} equal heads.\n  Choose a divisor of {self.inner(width)}."
            )
        return found

    def parameters(self, width: int) -> int:
        inner, rank, size = self.inner(width), self.rank(width), self.state_size
        projections = 3 * inner * width + self.bias * (2 * inner + width)
        conv = inner * (self.conv_width + self.conv_bias)
        selection = inner * (rank + 2 * size) + inner * (rank + 1)
        norms = self.inner_norms * (rank + 2 * size)
        return projections + conv + selection + norms + inner * size + inner

    def flops(self, width: int, seq_len: int) -> float:
        inner = self.inner(width)
        return self.matmul_flops(width) + 2 * self.conv_width * inner + 9 * inner * self.state_size + 2 * inner

    def matmul_flops(self, width: int) -> float:
        inner, rank = self.inner(width), self.rank(width)
        return 6 * inner * width + 2 * inner * (rank + 2 * self.state_size) + 2 * rank * inner

    def tensor_divides(self, width: int) -> dict[str, int] | None:
        return {"heads": self.heads} if self.heads > 1 else {"inner width": self.inner(width)}

    def tensor_parameters(self, width: int, degree: int) -> int:
        # The inner channels are cut; dt, B and C of a head are sums over all of them, and their norms are whole.
        whole = self.bias * width + self.inner_norms * (self.rank(width) + 2 * self.state_size)
        return (self.parameters(width) - whole) // degree + whole

    def saved_elements(self, width: int, seq_len: int) -> float:
        inner, rank, size = self.inner(width), self.rank(width), self.state_size
        convolved = 3 * inner  # before it, its sigmoid, after it
        selected = self.heads * (rank + 2 * size)
        if self.inner_norms:
            selected += selected + 3 * self.heads
        # dt with its bias, and after its softplus; the state at every chunk's start.
        scan = 2 * inner + size * inner * -(-seq_len // CHUNK) / seq_len
        gated = 4 * inner  # the gate, before and after its SiLU, what it multiplies, the product
        return width + convolved + selected + scan + gated

    def state_bytes(self, width: int, element_bytes: int) -> int:
        return self.inner(width) * (self.state_size * scan_bytes(element_bytes) + self.conv_width * element_bytes)
