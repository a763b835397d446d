"""Causal attention: keys, legality, formulas.

q query heads · kv key-value heads · d_h head width · D model width · s sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from zexp.blocks.base import BlockSpec, Role, unit_problems
from zexp.config.identity import semantic
from zexp.kernels.rotary.scaling import RopeScaling


@dataclass(frozen=True, kw_only=True)
class Spec(BlockSpec):
    """Grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023, arXiv:2305.13245).

    heads: query heads. kv_heads: key-value heads, null = heads. head_dim: null = width / heads.
    rope_theta: base of the rotary embedding (rotate-half), null = no position encoding.
    rope_fraction: share of a head's channels that is turned, the first ones (GPT-NeoX: 0.25).
    rope_scaling: Llama 3.1's change of the frequencies, null = none.
    qk_norm: RMSNorm over each head's queries and keys, one weight vector each. bias: on all four projections.
    qkv_bias: on queries, keys and values alone (Qwen2).
    logit_scale: what q·k is multiplied by, null = head_dim^-0.5.
    output_gate: a further matrix of the input makes sigmoid gates of the heads' outputs (Qwen3-Next).
    """

    ROLE: ClassVar[Role] = "mixer"
    NAME: ClassVar[str] = "attention"
    NUMERICS: ClassVar[dict[str, int]] = {"block.attention": 1, "kernel.attention": 1, "kernel.rotary": 1}

    SCALED_HEADS: ClassVar[tuple[str, ...]] = ("heads", "kv_heads")
    BF16_SAVED: ClassVar[float] = 2.0

    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = 10_000.0
    qk_norm: bool = False
    bias: bool = False
    rope_fraction: float = semantic(1.0, absent=1.0)
    rope_scaling: RopeScaling | None = semantic(None, absent=None)
    qkv_bias: bool = semantic(False, absent=False)
    logit_scale: float | None = semantic(None, absent=None)
    output_gate: bool = semantic(False, absent=False)

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
        if self.logit_scale is not None and self.logit_scale <= 0:
            found.append(f"{where}.logit_scale = {self.logit_scale}: it must be above 0, or null for head_dim^-0.5.")
        if self.bias and self.qkv_bias:
            found.append(f"{where}.qkv_bias: {where}.bias already gives queries, keys and values a bias. Set one of them.")
        return found + self._rope_problems(width, where)

    def _rope_problems(self, width: int, where: str) -> list[str]:
        head_dim = self._sizes(width)[2]
        found = []
        if self.rope_theta is None:
            found += [
                f"{where}.{key}: there is no rotary embedding to change, because {where}.rope_theta is null.\n"
                f"  Leave {key} out, or set rope_theta."
                for key, said in (("rope_fraction", self.rope_fraction != 1), ("rope_scaling", self.rope_scaling))
                if said
            ]
            return found
        if self.rope_theta <= 0:
            found.append(f"{where}.rope_theta = {self.rope_theta}: it must be above 0, or null for none.")
        if not 0 < self.rope_fraction <= 1:
            found.append(f"{where}.rope_fraction = {self.rope_fraction}: it must be above 0 and at most 1.")
        elif self.rope_fraction == 1 and head_dim % 2:
            found.append(
                f"{where}.rope_theta = {self.rope_theta}: rotary embedding pairs channels, but a head has {head_dim}.\n"
                f"  Choose an even head width, or set {where}.rope_theta=null."
            )
        elif self.turned(width) < 2 or self.turned(width) % 2:
            found.append(
                f"{where}.rope_fraction = {self.rope_fraction}: rotary embedding pairs channels, but that is "
                f"{self.turned(width)} of a head's {head_dim}.\n  Choose a share that makes an even number."
            )
        if self.rope_scaling is not None:
            found += self.rope_scaling.problems(f"{where}.rope_scaling")
        return found

    @property
    def seen(self) -> int | None:
        """Positions that a query sees, itself included; None = all before it."""
        return None

    def turned(self, width: int) -> int:
        """Channels of a head that the rotary embedding turns."""
        return int(self._sizes(width)[2] * self.rope_fraction)

    def scale(self, width: int) -> float:
        """What q·k is multiplied by."""
        return self._sizes(width)[2] ** -0.5 if self.logit_scale is None else self.logit_scale

    def _sizes(self, width: int) -> tuple[int, int, int]:
        full = self.completed(width)
        assert full.kv_heads is not None and full.head_dim is not None
        return full.heads, full.kv_heads, full.head_dim

    def _projected(self, width: int) -> int:
        """Columns of the matrix that reads the input: q, k, v and the gate."""
        q, kv, d_h = self._sizes(width)
        return (q * (2 if self.output_gate else 1) + 2 * kv) * d_h

    def parameters(self, width: int) -> int:
        q, _, d_h = self._sizes(width)
        biases = (self.bias or self.qkv_bias) * self._projected(width) + self.bias * width
        return width * self._projected(width) + q * d_h * width + biases + self.qk_norm * 2 * d_h

    def flops(self, width: int, seq_len: int) -> float:
        return self.matmul_flops(width) + self.score_flops(width, seq_len)

    def matmul_flops(self, width: int) -> float:
        q, _, d_h = self._sizes(width)
        return 2 * width * self._projected(width) + 2 * q * d_h * width

    def score_flops(self, width: int, seq_len: int) -> float:
        """q·k and the weighted sum of v, of the keys that a query sees."""
        q, _, d_h = self._sizes(width)
        return 2 * (seq_len + 1) * q * d_h

    def decode_flops(self, width: int, context: int) -> float:
        q, _, d_h = self._sizes(width)
        keys = context if self.seen is None else min(context, self.seen)
        return self.matmul_flops(width) + 4 * keys * q * d_h

    def tensor_divides(self, width: int) -> dict[str, int] | None:
        q, kv, _ = self._sizes(width)
        return {"heads": q, "kv_heads": kv}

    def tensor_parameters(self, width: int, degree: int) -> int:
        _, _, d_h = self._sizes(width)
        whole = self.bias * width + self.qk_norm * 2 * d_h
        return (self.parameters(width) - whole) // degree + whole

    def saved_elements(self, width: int, seq_len: int) -> float:
        q, kv, d_h = self._sizes(width)
        viewed = self.qk_norm or self.rope_theta is None  # then the projections are kept as they were computed
        changed = self.qk_norm or self.rope_theta is not None  # and what the norm or the rotation makes of q and k
        inputs = (self._projected(width) if viewed else kv * d_h) + changed * (q + kv) * d_h
        return width + inputs + q + q * d_h + self._around(width)

    def _around(self, width: int) -> int:
        """What the norms of q and k (a number a head) and the gate (its sigmoid, the gated outputs) keep."""
        q, kv, d_h = self._sizes(width)
        return self.qk_norm * (q + kv) + self.output_gate * 2 * q * d_h

    def kv_bytes_per_token(self, width: int, element_bytes: int) -> int:
        _, kv, d_h = self._sizes(width)
        return 2 * kv * d_h * element_bytes
