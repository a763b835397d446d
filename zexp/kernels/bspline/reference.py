"""A Kolmogorov-Arnold layer by its definitions, one basis function at a time. I inputs · O outputs · J bases."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from zexp.kernels.activation.names import Gate
from zexp.kernels.activation.reference import activate


def knots(order: int, grid: int, half_range: float) -> list[float]:
    """Where the pieces meet: the grid over [-half_range, half_range], and `order` more knots on either side."""
    step = 2 * half_range / grid
    return [-half_range + (i - order) * step for i in range(grid + 2 * order + 1)]


def bspline(x: Tensor, order: int, grid: int, half_range: float) -> Tensor:
    """The J = grid + order basis functions at x, (…, J), by the recursion of Cox and de Boor.

    Source: KAN (arXiv:2404.19756), section 2.2 and its appendix on grid extension.
    """
    at = knots(order, grid, half_range)
    bases = [((x >= low) & (x < high)).to(x.dtype) for low, high in pairwise(at)]
    for k in range(1, order + 1):
        bases = [
            (x - at[i]) / (at[i + k] - at[i]) * bases[i]
            + (at[i + k + 1] - x) / (at[i + k + 1] - at[i + 1]) * bases[i + 1]
            for i in range(len(bases) - 1)
        ]
    return torch.stack(bases, dim=-1)


def kan_linear(x: Tensor, weight: Tensor, *, order: int, grid: int, half_range: float, base: Gate) -> Tensor:
    """Each output the sum over inputs of w · base(x) + Σ_j c_j B_j(x), (…, O); KAN (arXiv:2404.19756), eq. 2.10 to 2.12.

    weight: (O, (1 + J) I): all w of an output, then c_0 of all inputs, c_1, ….
    """
    features = torch.cat((activate(x, base)[..., None], bspline(x, order, grid, half_range)), dim=-1)  # (…, I, 1 + J)
    return torch.einsum("...ij,oji->...o", features, weight.unflatten(1, (-1, x.shape[-1])))
