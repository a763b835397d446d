"""The global batch of an optimizer step, read from the packed corpora. B sequences · T labels each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zexp.data import windows
from zexp.data.stream import Segment, Stream
from zexp.data.windows import Windows
from zexp.store.errors import StoreError
from zexp.store.files import read_json
from zexp.store.folder import Store


@dataclass(frozen=True)
class Batch:
    """documents_BT: the document of each input, non-decreasing along T."""

    inputs_BT: Tensor
    labels_BT: Tensor
    documents_BT: Tensor

    def micro_batches(self, sequences: int) -> "list[Batch]":
        """Slices of at most so many sequences, in order."""
        parts = (tensor.split(sequences) for tensor in (self.inputs_BT, self.labels_BT, self.documents_BT))
        return [Batch(*slices) for slices in zip(*parts, strict=True)]


class Batches:
    """Random access to the sequences that a chain's last segment reads.

    rank, ranks: of how many equal, contiguous shares of every batch this is which.
    """

    def __init__(self, store: Store, chain: Sequence[Segment], device: str, rank: int = 0, ranks: int = 1):
        self.stream = Stream(chain, _bins(store, chain))
        self._store, self._device = store, device
        self._rank, self._ranks = rank, ranks
        self._windows: dict[str, Windows] = {}
        self._prepared: tuple[tuple[int, int], Batch] | None = None

    def prepare(self, tokens: int, batch_tokens: int) -> None:
        """Read ahead what `read` will be asked for next: to be called while the device has work."""
        self._prepared = ((tokens, batch_tokens), self._read(tokens, batch_tokens))

    def read(self, tokens: int, batch_tokens: int) -> Batch:
        """This share of what the optimizer step from `tokens` (absolute) to tokens + batch_tokens trains on."""
        (asked, batch), self._prepared = self._prepared or (None, None), None
        return batch if batch is not None and asked == (tokens, batch_tokens) else self._read(tokens, batch_tokens)

    def _read(self, tokens: int, batch_tokens: int) -> Batch:
        first, stop = self.stream.item_at(tokens), self.stream.item_at(tokens + batch_tokens)
        share, rest = divmod(stop - first, self._ranks)
        if rest:
            raise ValueError(f"a batch of {stop - first} sequences cannot be shared evenly among {self._ranks} ranks")
        first += self._rank * share
        rows = [self._row(item) for item in range(first, first + share)]
        tokens_BT, documents_BT = (self._placed(np.stack(one)) for one in zip(*rows, strict=True))
        return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], documents_BT[:, :-1])

    def _placed(self, rows_BT: np.ndarray) -> Tensor:
        """On the device. A GPU copies by itself, out of memory that stays where it is, and nobody waits."""
        read = torch.from_numpy(rows_BT)
        return read.pin_memory().to(self._device, non_blocking=True) if self._device.startswith("cuda") else read

    def _row(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        place = self.stream.locate(item)
        if place.packing not in self._windows:
            self._windows[place.packing] = windows.open(self._store, place.packing)
        return self._windows[place.packing].read(place.bin)


def _bins(store: Store, chain: Sequence[Segment]) -> dict[str, int]:
    """The number of bins of every packing that the chain names; StoreError if one is not built."""
    bins: dict[str, int] = {}
    for segment in chain:
        for entry in segment.semantic["streams"]:
            if "packing" in entry and entry["packing"] not in bins:
                bins[entry["packing"]] = _bins_of(store, entry)
    return bins


def _bins_of(store: Store, entry: Mapping[str, Any]) -> int:
    folder = store.folder("packing", entry["packing"])
    if folder.result is None:
        raise StoreError(f"{folder.path} has no result: the packed corpus that this segment reads is not built.")
    return int(read_json(folder.result / "manifest.json")["bins"])
