"""Experts, each of them computed for every token.

M tokens · D model width · E experts · K chosen for a token · F expert width · H rows of `up`: F, or 2F with a gate.
"""

from __future__ import annotations

from torch import Tensor

from zexp.kernels.activation.names import Activation
from zexp.kernels.activation.reference import mlp_activation


def moe(
    x_MD: Tensor, chosen_KM: Tensor, weights_KM: Tensor, up_EHD: Tensor, down_EDF: Tensor, activation: Activation
) -> Tensor:
    """(M, D): the sum over the K chosen experts e of weight · down_e act(up_e x)."""
    out_MD = x_MD.new_zeros(x_MD.shape)
    for expert, (up_HD, down_DF) in enumerate(zip(up_EHD, down_EDF, strict=True)):
        weight_M = (weights_KM * (chosen_KM == expert)).sum(0)
        out_MD = out_MD + weight_M[:, None] * (mlp_activation(x_MD @ up_HD.T, activation) @ down_DF.T)
    return out_MD
