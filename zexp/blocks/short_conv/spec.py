"""Gated short convolution: keys, legality, formulas. K conv width · D model width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zexp.blocks.base import BlockSpec, Role, unit_problems


@dataclass(frozen=True, kw_only=True)
class Spec(BlockSpec):
    """The gated short convolution of LFM2 (Liquid AI 2025, arXiv:2511.23404): out_proj(C * conv(B * x)), where B, C and
    x, of D channels each, are linear in the input and conv is causal and depthwise, without an activation.

    conv_width: K, positions the convolution sees, itself included. bias: on both matrices and the convolution.
    """

    ROLE: ClassVar[Role] = "mixer"
    NAME: ClassVar[str] = "short_conv"
    NUMERICS: ClassVar[dict[str, int]] = {"block.short_conv": 1, "kernel.causal_conv1d": 1}
    BF16_SAVED: ClassVar[float] = 2.0

    conv_width: int = 3
    bias: bool = False

    def problems(self, width: int, where: str) -> list[str]:
        return unit_problems({"conv_width": self.conv_width}, where)

    def parameters(self, width: int) -> int:
        return 4 * width * width + self.conv_width * width + self.bias * 5 * width

    def flops(self, width: int, seq_len: int) -> float:
        return self.matmul_flops(width) + 2 * self.conv_width * width + 2 * width

    def matmul_flops(self, width: int) -> float:
        return 8 * width * width

    def tensor_divides(self, width: int) -> dict[str, int] | None:
        return {"width": width}

    def tensor_parameters(self, width: int, degree: int) -> int:
        whole = self.bias * width  # the last matrix's bias, which is added once the parts are
        return (self.parameters(width) - whole) // degree + whole

    def saved_elements(self, width: int, seq_len: int) -> float:
        # The normed input; B, C, x; their product before and after the convolution; what the last matrix reads.
        return 7 * width

    def state_bytes(self, width: int, element_bytes: int) -> int:
        return self.conv_width * width * element_bytes
