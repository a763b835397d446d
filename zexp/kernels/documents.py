"""Document boundaries of a batch, and the masks that operations derive from them.

B batch · T positions. Ids are compared, never turned into -inf decays: those make NaN in cumulative sums.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Documents:
    """Which document each position belongs to.

    ids_BT: integers; equal neighbours are one document. A document is one run: an id does not come back later in its row.
    """

    def __init__(self, ids_BT: Tensor):
        self.ids_BT = ids_BT
        self._same: dict[int, Tensor] = {}
        self._biases: dict[torch.dtype, Tensor] = {}

    def same_as_before(self, shift: int) -> Tensor:
        """Whether position t and position t - shift are one document, for t = shift .. T - 1: (B, T - shift) bool."""
        if shift not in self._same:
            self._same[shift] = self.ids_BT[:, shift:] == self.ids_BT[:, : self.ids_BT.shape[1] - shift]
        return self._same[shift]

    def causal_bias(self, dtype: torch.dtype) -> Tensor:
        """What is added to the scores: 0 where causal_mask_BTT is true, -inf elsewhere, (B, T, T). One for all layers:
        from a mask of booleans each would make, and keep for its backward pass, one of its own.
        """
        if dtype not in self._biases:
            zeros = torch.zeros(self.causal_mask_BTT.shape, dtype=dtype, device=self.ids_BT.device)
            self._biases[dtype] = zeros.masked_fill_(~self.causal_mask_BTT, float("-inf"))
        return self._biases[dtype]

    @cached_property
    def causal_mask_BTT(self) -> Tensor:
        """Whether query t (dim 1) may see key s (dim 2): the same document and s <= t."""
        return (self.ids_BT[:, :, None] == self.ids_BT[:, None, :]).tril()
