"""Running sums along a dimension, also where torch has no deterministic one."""

from __future__ import annotations

import torch
from torch import Tensor


def running_sum(x: Tensor, dim: int, *, reverse: bool = False) -> Tensor:
    """x[0] + … + x[i] along a dimension, or x[i] + … + x[-1]; in x's dtype, floating-point.

    On CUDA torch's cumsum raises under deterministic algorithms; there it is a product with a triangle of ones, which costs n
    times the additions and is meant for the positions of a chunk.
    """
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return by_product(x, dim, reverse=reverse)
    return x.flip(dim).cumsum(dim).flip(dim) if reverse else x.cumsum(dim)


def by_product(x: Tensor, dim: int, *, reverse: bool = False) -> Tensor:
    """The same as a product of matrices."""
    ones = x.new_ones(x.shape[dim], x.shape[dim])
    return torch.matmul(x.movedim(dim, -1), ones.tril() if reverse else ones.triu()).movedim(-1, dim)
