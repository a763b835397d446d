"""The Zamba shared transformer block: keys, legality, formulas.

D model width · E input width (2D with the embeddings) · q heads · F MLP width · R LoRA rank · s sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from zexp.blocks.base import FeederSpec, unit_problems
from zexp.kernels.activation.names import Gate


@dataclass(frozen=True, kw_only=True)
class LoraRank:
    """Rank of the adapters that each call has to itself; 0 = none. B·A without an alpha.

    mlp: on the gate and up matrix. attention: on q, k and v, one adapter each.
    """

    mlp: int = 0
    attention: int = 0


@dataclass(frozen=True, kw_only=True)
class Spec(FeederSpec):
    """The shared block of Zamba (arXiv:2405.16712) and Zamba2 (arXiv:2411.15242).

    copies: sets of shared weights, called in turn (ABAB). heads: attention heads over the input width.
    mlp_width: F of the gated MLP. activation: the function of its gate.
    concat_embeddings: the input is concat(hidden, token embeddings) of width 2D, else the hidden state alone.
    call_linear: a D × D matrix per call on the block's output. rope_theta: null = no position encoding.
    """

    NAME: ClassVar[str] = "shared"
    NUMERICS: ClassVar[dict[str, int]] = {
        "block.shared": 1,
        "kernel.activation": 1,
        "kernel.attention": 1,
        "kernel.rotary": 1,
    }

    SCALED_WIDTHS: ClassVar[tuple[str, ...]] = ("mlp_width",)
    SCALED_HEADS: ClassVar[tuple[str, ...]] = ("heads",)
    BF16_SAVED: ClassVar[float] = 2.3

    heads: int
    mlp_width: int
    activation: Gate = "gelu_erf"
    concat_embeddings: bool = True
    lora_rank: LoraRank = field(default_factory=LoraRank)
    call_linear: bool = True
    rope_theta: float | None = None

    def input_width(self, width: int) -> int:
        return width * (2 if self.concat_embeddings else 1)

    def problems(self, width: int, where: str) -> list[str]:
        found = unit_problems({"copies": self.copies, "heads": self.heads, "mlp_width": self.mlp_width}, where)
        ranks = {"mlp": self.lora_rank.mlp, "attention": self.lora_rank.attention}
        found += [
            f"{where}.lora_rank.{key} = {rank}: a rank is 0 (none) or more." for key, rank in ranks.items() if rank < 0
        ]
        if found:
            return found
        entered = self.input_width(width)
        if entered % self.heads:
            found.append(
                f"{where}.heads = {self.heads}: the block's input of width {entered} cannot be cut into {self.heads} "
                f"equal heads.\n  Choose a divisor of {entered}."
            )
        elif self.rope_theta is not None and (entered // self.heads) % 2:
            found.append(
                f"{where}.rope_theta = {self.rope_theta}: rotary embedding pairs channels, but a head has "
                f"{entered // self.heads}.\n  Choose an even head width, or set {where}.rope_theta=null."
            )
        if self.rope_theta is not None and self.rope_theta <= 0:
            found.append(f"{where}.rope_theta = {self.rope_theta}: it must be above 0, or null for none.")
        return found

    def parameters(self, width: int) -> int:
        entered = self.input_width(width)
        attention = 3 * entered * entered + entered * width
        return entered + attention + width + 3 * width * self.mlp_width

    def call_parameters(self, width: int) -> int:
        return self._adapters(width) + self.call_linear * width * width

    def flops(self, width: int, seq_len: int) -> float:
        entered = self.input_width(width)
        return self.matmul_flops(width) + 2 * (seq_len + 1) * entered

    def matmul_flops(self, width: int) -> float:
        entered = self.input_width(width)
        attention = 6 * entered * entered + 2 * entered * width
        return attention + 6 * width * self.mlp_width + 2 * self.call_parameters(width)

    def decode_flops(self, width: int, context: int) -> float:
        return self.matmul_flops(width) + 4 * context * self.input_width(width)

    def tensor_divides(self, width: int) -> dict[str, int] | None:
        return {"heads": self.heads, "mlp_width": self.mlp_width}

    def tensor_parameters(self, width: int, degree: int) -> int:
        norms = self.input_width(width) + width
        return (self.parameters(width) - norms) // degree + norms

    def call_tensor_parameters(self, width: int, degree: int) -> int:
        # An adapter's second matrix is cut like the shared one that it adds to; its first and the last map are whole.
        up = self.lora_rank.mlp * 2 * self.mlp_width + self.lora_rank.attention * 3 * self.input_width(width)
        return self.call_parameters(width) - up + up // degree

    def saved_whole(self, width: int) -> float:
        # Inputs of both norms and of the matrices behind them, narrow vectors of adapters, the last map's input.
        narrow = 3 * self.lora_rank.attention + self.lora_rank.mlp + 2
        return 2 * self.input_width(width) + 2 * width + narrow + self.call_linear * width

    def saved_elements(self, width: int, seq_len: int) -> float:
        entered = self.input_width(width)
        attention = 2 * entered + 4 * entered + self.heads + 1  # before and after its norm; q, k, v and the output
        adapters = 3 * self.lora_rank.attention + self.lora_rank.mlp
        return attention + adapters + 2 * width + 1 + 4 * self.mlp_width + self.call_linear * width

    def kv_bytes_per_token(self, width: int, element_bytes: int) -> int:
        return 2 * self.input_width(width) * element_bytes

    def _adapters(self, width: int) -> int:
        mlp = self.lora_rank.mlp * (width + 2 * self.mlp_width)
        return mlp + self.lora_rank.attention * 3 * 2 * self.input_width(width)
