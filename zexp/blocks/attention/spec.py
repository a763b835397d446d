"""Causal attention: keys, legality, formulas.

q query heads · kv key-value heads · d_h head width · D model width · s sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from zexp.blocks.base import BlockSpec, Role, unit_problems


@dataclass(frozen=True, kw_only=True)
class Spec(BlockSpec):
    """Grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023, arXiv:2305.13245).

    heads: query heads. kv_heads: key-value heads, null = heads. head_dim: null = width / heads.
    rope_theta: base of the rotary embedding (rotate-half over the whole head), null = no position encoding.
    qk_norm: RMSNorm over each head's queries and keys, one weight vector each. bias: on all four projections.
    """

    ROLE: ClassVar[Role] = "mixer"
    NAME: ClassVar[str] = "attention"
    NUMERICS: ClassVar[dict[str, int]] = {"block.attention": 1, "kernel.attention": 1, "kernel.rotary": 1}

    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = 10_000.0
    qk_norm: bool = False
    bias: bool = False

    def completed(self, width: int) -> Spec:
        return replace(
            self,
            kv_heads=self.heads if self.kv_heads is None else self.kv_heads,
            head_dim=width // max(self.heads, 1) if self.head_dim is None else self.head_dim,
        )

    def problems(self, width: int, where: str) -> list[str]:
        sizes = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        found = unit_problems({key: size for key, size in sizes.items() if size is not None}, where)
        if found:
            return found
        if self.head_dim is None and width % self.heads:
            found.append(
                f"{where}.heads = {self.heads}: the width {width} cannot be cut into {self.heads} equal heads.\n"
                f"  Choose a divisor of {width}, or set {where}.head_dim."
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            found.append(
                f"{where}.kv_heads = {self.kv_heads}: {self.heads} query heads cannot share {self.kv_heads} evenly.\n"
                f"  Choose a divisor of {self.heads}."
            )
        head_dim = self.completed(width).head_dim
        if self.rope_theta is not None and head_dim is not None and head_dim % 2:
            found.append(
                f"{where}.rope_theta = {self.rope_theta}: rotary embedding pairs channels, but a head has {head_dim}.\n"
                f"  Choose an even head width, or set {where}.rope_theta=null."
            )
        if self.rope_theta is not None and self.rope_theta <= 0:
            found.append(f"{where}.rope_theta = {self.rope_theta}: it must be above 0, or null for none.")
        return found

    def _sizes(self, width: int) -> tuple[int, int, int]:
        full = self.completed(width)
        assert full.kv_heads is not None and full.head_dim is not None
        return full.heads, full.kv_heads, full.head_dim

    def parameters(self, width: int) -> int:
        q, kv, d_h = self._sizes(width)
        weights = width * (q + 2 * kv) * d_h + q * d_h * width
        return weights + self.bias * ((q + 2 * kv) * d_h + width) + self.qk_norm * 2 * d_h

    def flops(self, width: int, seq_len: int) -> float:
        q, kv, d_h = self._sizes(width)
        return 2 * width * (q + 2 * kv) * d_h + 2 * q * d_h * width + 2 * (seq_len + 1) * q * d_h

    def kv_bytes_per_token(self, width: int, element_bytes: int) -> int:
        _, kv, d_h = self._sizes(width)
        return 2 * kv * d_h * element_bytes
