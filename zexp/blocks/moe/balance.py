"""What evens out the experts' loads in training: losses of the router, and offsets of its choice.

E experts first, so that what is done to every token runs along memory (a softmax over 8 numbers that lie side by side
takes twenty times as long on a CPU) · K chosen for a token · B sequences · T positions · M = B · T tokens · G groups.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from zexp.kernels.documents import Documents


class Groups:
    """The tokens whose loads are balanced among themselves: each sequence, or each document of it."""

    def __init__(self, shape: tuple[int, int], documents: Documents | None):
        """shape: B, T. documents: None = each sequence is a group."""
        self._shape, self._documents = shape, documents

    def sums(self, x_EM: Tensor) -> Tensor:
        """(E, G): x summed over each group."""
        if self._documents is None:
            return x_EM.unflatten(1, self._shape).sum(-1)
        group_M, sizes_G = self._runs
        return x_EM.new_zeros(x_EM.shape[0], sizes_G.shape[0]).index_add_(1, group_M, x_EM)

    def spread(self, x_EG: Tensor) -> Tensor:
        """(E, M): to each token what its group has."""
        if self._documents is None:
            return x_EG[..., None].expand(-1, *self._shape).flatten(1)
        return x_EG[:, self._runs[0]]

    @property
    def sizes(self) -> Tensor | int:
        """Tokens of each group: (G,), or a number for all."""
        return self._shape[1] if self._documents is None else self._runs[1]

    @cached_property
    def _runs(self) -> tuple[Tensor, Tensor]:
        """Each token's group, (M,), and each group's size, (G,)."""
        assert self._documents is not None
        starts_BT = torch.ones(self._shape, dtype=torch.bool, device=self._documents.ids_BT.device)
        starts_BT[:, 1:] = ~self._documents.same_as_before(1)
        group_M = starts_BT.flatten().cumsum(0) - 1
        return group_M, torch.bincount(group_M)


@torch.no_grad()
def sinkhorn_offsets(logits_EM: Tensor, groups: Groups, iterations: int) -> Tensor:
    """(E, M): what added to the logits makes the softmax of each token, summed over a group, the same for every expert.

    These are the logarithms of Sinkhorn's factors of the experts; those of the tokens do not change which expert is the
    largest. A group of one token has none: evened out, all its experts would be equal.
    """
    smallest = torch.finfo(logits_EM.dtype).tiny
    offsets_EG = groups.sums(torch.zeros_like(logits_EM))
    for _ in range(iterations):
        loads_EG = groups.sums((logits_EM + groups.spread(offsets_EG)).softmax(0)) / groups.sizes
        offsets_EG -= (loads_EG * logits_EM.shape[0]).clamp_(min=smallest).log_()
    return groups.spread(offsets_EG * (groups.sizes > 1))


def aux_loss(probabilities_EM: Tensor, chosen_KM: Tensor, groups: Groups) -> Tensor:
    """Over all tokens the sum of E · sum over experts of (share of its group's choices) · (its probability); 1 a token at
    perfect balance. A scalar, whose gradient goes through the probabilities alone.
    """
    experts, top_k = probabilities_EM.shape[0], chosen_KM.shape[0]
    with torch.no_grad():
        picks_EM = torch.zeros_like(probabilities_EM).scatter_(0, chosen_KM, 1.0)
        shares_EG = groups.sums(picks_EM).mul_(experts / top_k) / groups.sizes
    return (groups.sums(probabilities_EM) * shares_EG).sum()


def z_loss(logits_EM: Tensor) -> Tensor:
    """Over all tokens the sum of the squared log-sum-exp of the logits: a scalar."""
    return logits_EM.logsumexp(0).square().sum()
