"""Document boundaries of a batch, and the masks that operations derive from them.

B batch · T positions. Ids are compared, never turned into -inf decays: those make NaN in cumulative sums.
"""

from __future__ import annotations

from functools import cached_property

from torch import Tensor


class Documents:
    """Which document each position belongs to.

    ids_BT: integers; equal neighbours are one document. A document is one run: an id does not come back later in its row.
    """

    def __init__(self, ids_BT: Tensor):
        self.ids_BT = ids_BT
        self._same: dict[int, Tensor] = {}

    def same_as_before(self, shift: int) -> Tensor:
        """Whether position t and position t - shift are one document, for t = shift .. T - 1: (B, T - shift) bool."""
        if shift not in self._same:
            self._same[shift] = self.ids_BT[:, shift:] == self.ids_BT[:, : self.ids_BT.shape[1] - shift]
        return self._same[shift]

    @cached_property
    def causal_mask_BTT(self) -> Tensor:
        """Whether query t (dim 1) may see key s (dim 2): the same document and s <= t."""
        return (self.ids_BT[:, :, None] == self.ids_BT[:, None, :]).tril()
