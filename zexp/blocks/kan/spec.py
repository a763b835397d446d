"""The KAN channel mixer: keys, legality, formulas. D model width · F hidden width · J bases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zexp.blocks.base import BlockSpec, Role, unit_problems
from zexp.kernels.activation.names import Gate

HIGHEST_ORDER = 5  # beyond it the closed form of a basis loses digits in fp32


@dataclass(frozen=True, kw_only=True)
class Spec(BlockSpec):
    """Two layers D -> F -> D whose every edge has a function of its own (Liu et al. 2024, arXiv:2404.19756, section 2),
    phi(x) = w · base(x) + Σ_j c_j B_j(x). The paper's scale w_s of the spline is part of its c_j.

    width: F. grid: intervals of the uniform grid. order: of the B-splines (3 = cubic). range: the grid covers
    [-range, range] and stays there, where the paper moves it to the inputs. It goes on for `order` intervals on either side:
    outside of the range the splines fade, and w · base(x) is left. A normed input has a deviation of 1, so a range of 1
    leaves a third of the first layer's inputs to the fading ends.
    base: the function beside the splines.
    """

    ROLE: ClassVar[Role] = "channel"
    NAME: ClassVar[str] = "kan"
    NUMERICS: ClassVar[dict[str, int]] = {"block.kan": 1, "kernel.activation": 1, "kernel.bspline": 1}

    SCALED_WIDTHS: ClassVar[tuple[str, ...]] = ("width",)

    width: int
    grid: int = 5
    order: int = 3
    range: float = 1.0
    base: Gate = "silu"

    @property
    def planes(self) -> int:
        """Functions of one input: its bases and the base activation."""
        return 1 + self.grid + self.order

    def problems(self, width: int, where: str) -> list[str]:
        found = unit_problems({"width": self.width, "grid": self.grid}, where)
        if not 1 <= self.order <= HIGHEST_ORDER:
            found.append(f"{where}.order = {self.order}: splines of order 1 (linear) to {HIGHEST_ORDER} are computed.")
        if self.range <= 0:
            found.append(f"{where}.range = {self.range}: it must be above 0; the grid covers [-range, range].")
        return found

    def parameters(self, width: int) -> int:
        return 2 * width * self.width * self.planes

    def flops(self, width: int, seq_len: int) -> float:
        return self.matmul_flops(width)

    def matmul_flops(self, width: int) -> float:
        return 4 * width * self.width * self.planes

    def tensor_divides(self, width: int) -> dict[str, int] | None:
        return {"width": self.width}

    def tensor_parameters(self, width: int, degree: int) -> int:
        return self.parameters(width) // degree

    def saved_elements(self, width: int, seq_len: int) -> float:
        return width + self.width  # the inputs of both layers; their bases are made again
