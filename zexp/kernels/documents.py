"""Document boundaries of a batch, and what operations derive from them: made once, for all layers and both passes.

B batch · T positions. Ids are compared, never turned into -inf decays: those make NaN in cumulative sums.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Made = TypeVar("Made")


class Documents:
    """Which document each position belongs to.

    ids_BT: integers; equal neighbours are one document. A document is one run: an id does not come back later in its row.
    """

    def __init__(self, ids_BT: Tensor):
        self.ids_BT = ids_BT
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returns, made at the first call with `key`, which holds all that it depends on besides the ids.

        All callers get the same object: none may write into it. It lives as long as the batch.
        """
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def same_as_before(self, shift: int) -> Tensor:
        """Whether position t and position t - shift are one document, for t = shift .. T - 1: (B, T - shift) bool."""
        ids_BT = self.ids_BT
        return self.once(("same", shift), lambda: ids_BT[:, shift:] == ids_BT[:, : ids_BT.shape[1] - shift])

    def padded(self, multiple: int) -> Tensor:
        """The ids of rows that are padded at the end to a multiple of so many positions, by more of the last document."""
        missing = -self.ids_BT.shape[1] % multiple
        if not missing:
            return self.ids_BT
        return torch.cat((self.ids_BT, self.ids_BT[:, -1:].expand(-1, missing)), dim=1)

    def positions(self) -> Tensor:
        """Each position's document, counted from 0 in its row: (B, T) int32, whatever the ids are (fused kernels' seq_idx)."""

        def make() -> Tensor:
            starts_BT = F.pad((self.ids_BT[:, 1:] != self.ids_BT[:, :-1]).int(), (1, 0))
            return starts_BT.cumsum(1, dtype=torch.int32)

        return self.once("positions", make)

    def ids_int64(self) -> Tensor:
        """The ids, (B, T), side by side."""
        return self.once("ids int64", lambda: self.ids_BT.long().contiguous())

    def starts(self) -> Tensor:
        """Whether a position is the first of a document other than its row's first: (B, T) bool."""
        return self.once("starts", lambda: F.pad(self.ids_BT[:, 1:] != self.ids_BT[:, :-1], (1, 0)))

    def firsts(self) -> Tensor:
        """The position in its row at which each position's document begins: (B, T) int64, side by side."""

        def make() -> Tensor:
            positions_T = torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device)
            return (positions_T * self.starts()).cummax(1).values

        return self.once("firsts", make)

    def ends(self) -> tuple[Tensor, int]:
        """Of all rows one after the other: 0 and the position after each document, int32, and the longest one's length.

        Waits for the device, once a batch.
        """

        def make() -> tuple[Tensor, int]:
            first_BT = self.starts().clone()
            first_BT[:, 0] = True
            positions = first_BT.flatten().nonzero().flatten()
            ends = F.pad(positions, (0, 1), value=first_BT.numel()).int()
            return ends, int(ends.diff().max())

        return self.once("ends", make)
