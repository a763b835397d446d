"""The dense MLP: keys, legality, formulas. F MLP width · D model width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zexp.blocks.base import BlockSpec, Role, unit_problems
from zexp.kernels.activation.names import GATED, Activation


@dataclass(frozen=True, kw_only=True)
class Spec(BlockSpec):
    """Two matrices around an activation, or three with a gate (Shazeer 2020, arXiv:2002.05202).

    width: F, the inner width. activation: swiglu, geglu_erf, geglu_tanh, reglu are gated (act(gate) * up);
    silu, gelu_erf, gelu_tanh, relu, relu2 are not. bias: on every matrix.
    """

    ROLE: ClassVar[Role] = "channel"
    NAME: ClassVar[str] = "mlp"
    NUMERICS: ClassVar[dict[str, int]] = {"block.mlp": 1, "kernel.activation": 1}

    width: int
    activation: Activation = "swiglu"
    bias: bool = False

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    def problems(self, width: int, where: str) -> list[str]:
        return unit_problems({"width": self.width}, where)

    def parameters(self, width: int) -> int:
        inner = self.width * (2 if self.gated else 1)
        return width * inner + self.width * width + self.bias * (inner + width)

    def flops(self, width: int, seq_len: int) -> float:
        return self.matmul_flops(width)

    def matmul_flops(self, width: int) -> float:
        return (6 if self.gated else 4) * width * self.width

    def saved_elements(self, width: int, seq_len: int) -> float:
        # Gated: gate and up, the gate's activation, their product. Plain: before and after the activation.
        return width + self.width * (4 if self.gated else 2 + (self.activation == "relu2"))
