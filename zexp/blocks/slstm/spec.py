"""sLSTM: keys, legality, formulas. H heads · P head width (D / H) · K conv width · D model width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zexp.blocks.base import BlockSpec, Role, scan_bytes, unit_problems


@dataclass(frozen=True, kw_only=True)
class Spec(BlockSpec):
    """sLSTM (Beck et al. 2024, arXiv:2405.04517, section 2.2) in the block of its figure 10.

    The MLP that the figure draws behind it (GeGLU, projection factor 4/3) is a layer of its own: 's d', with d's width.
    heads: H; all matrices are block-diagonal, a block a head, and a head's memory is its own.
    conv_width: K, positions that the causal convolution before the input and forget gates sees, itself included;
    null = no convolution.
    """

    ROLE: ClassVar[Role] = "mixer"
    NAME: ClassVar[str] = "slstm"
    NUMERICS: ClassVar[dict[str, int]] = {
        "block.slstm": 1,
        "kernel.causal_conv1d": 1,
        "kernel.head_norm": 1,
        "kernel.slstm": 1,
    }

    SCALED_HEADS: ClassVar[tuple[str, ...]] = ("heads",)

    heads: int
    conv_width: int | None = 4

    def problems(self, width: int, where: str) -> list[str]:
        sizes = {"heads": self.heads} | ({} if self.conv_width is None else {"conv_width": self.conv_width})
        found = unit_problems(sizes, where)
        if not found and width % self.heads:
            found.append(
                f"{where}.heads = {self.heads}: the width {width} cannot be cut into {self.heads} heads.\n"
                f"  Choose a divisor of {width}."
            )
        return found

    def parameters(self, width: int) -> int:
        conv = 0 if self.conv_width is None else width * self.conv_width + width
        gates = 4 * width * (width // self.heads)  # once from the input, once from the memory
        return conv + 2 * gates + 4 * width + width

    def tensor_divides(self, width: int) -> dict[str, int] | None:
        return {"heads": self.heads}

    def tensor_parameters(self, width: int, degree: int) -> int:
        return self.parameters(width) // degree

    def flops(self, width: int, seq_len: int) -> float:
        return self.matmul_flops(width) + 2 * (self.conv_width or 0) * width

    def matmul_flops(self, width: int) -> float:
        return 2 * 8 * width * (width // self.heads)

    def saved_elements(self, width: int, seq_len: int) -> float:
        convolved = 0 if self.conv_width is None else 2 * width  # its sigmoid, after it
        # The normed input; four gates, the memory's value, the cell's output; two numbers a head of its norm.
        return width + convolved + 6 * width + 2 * self.heads

    def state_bytes(self, width: int, element_bytes: int) -> int:
        return 3 * width * scan_bytes(element_bytes) + (self.conv_width or 0) * width * element_bytes
