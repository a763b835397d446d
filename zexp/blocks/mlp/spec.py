"""The dense MLP: keys, legality, formulas. F MLP width · D model width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zexp.blocks.base import BlockSpec, Role, unit_problems
from zexp.config.identity import semantic
from zexp.kernels.activation.names import GATED, Activation, kept_between


@dataclass(frozen=True, kw_only=True)
class Spec(BlockSpec):
    """Two matrices around an activation, or three with a gate (Shazeer 2020, arXiv:2002.05202).

    width: F, the inner width. activation: swiglu, geglu_erf, geglu_tanh, reglu are gated (act(gate) * up);
    silu, gelu_erf, gelu_tanh, relu, relu2 are not. bias: on every matrix.
    token_shift: the first matrix reads x_t + (x_{t-1} - x_t) * mix, with a learned mix per channel, and the weights start as
    in RWKV-7: with relu2 and F = 4D this is its channel mix (Peng et al. 2025, arXiv:2503.14456, section 4.2).
    """

    ROLE: ClassVar[Role] = "channel"
    NAME: ClassVar[str] = "mlp"
    NUMERICS: ClassVar[dict[str, int]] = {"block.mlp": 1, "kernel.activation": 1}

    SCALED_WIDTHS: ClassVar[tuple[str, ...]] = ("width",)
    BF16_SAVED: ClassVar[float] = 2.0

    width: int
    activation: Activation = "swiglu"
    bias: bool = False
    token_shift: bool = semantic(False, absent=False)

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    def numerics(self) -> dict[str, int]:
        return self.NUMERICS | {"kernel.token_shift": 1} if self.token_shift else self.NUMERICS

    def problems(self, width: int, where: str) -> list[str]:
        return unit_problems({"width": self.width}, where)

    def parameters(self, width: int) -> int:
        inner = self.width * (2 if self.gated else 1)
        return width * inner + self.width * width + self.bias * (inner + width) + self.token_shift * width

    def flops(self, width: int, seq_len: int) -> float:
        return self.matmul_flops(width)

    def matmul_flops(self, width: int) -> float:
        return (6 if self.gated else 4) * width * self.width

    def tensor_divides(self, width: int) -> dict[str, int] | None:
        return {"width": self.width}

    def tensor_parameters(self, width: int, degree: int) -> int:
        whole = (self.bias + self.token_shift) * width
        return (self.parameters(width) - whole) // degree + whole

    def saved_elements(self, width: int, seq_len: int) -> float:
        read = width * (2 if self.token_shift else 1)
        return read + self.width * kept_between(self.activation)

    def state_bytes(self, width: int, element_bytes: int) -> int:
        return self.token_shift * width * element_bytes
