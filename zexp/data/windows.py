"""Reading bins: any one at once, from memory-mapped files."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zexp.data import corpus
from zexp.store import files
from zexp.store.folder import Store


@dataclass(frozen=True)
class Windows:
    """The bins of a packing."""

    seq_len: int
    starts: NDArray[np.int64]  # of each bin, in tokens of the corpus
    tokens: NDArray[np.unsignedinteger]  # the corpus
    offsets: NDArray[np.int64]  # where its documents start, and where the last eod is

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, bin: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """(tokens, documents) of a bin, seq_len + 1 long: inputs are [:-1], labels [1:].

        documents: the document of each token, counted from 0 in this bin; an eod belongs to the document after it.
        IndexError for a bin that there is not.
        """
        if not 0 <= bin < len(self.starts):
            raise IndexError(f"bin {bin} of a packing with {len(self.starts)}")
        start = int(self.starts[bin])
        tokens = self.tokens[start : start + self.seq_len + 1].astype(np.int64)
        documents = np.searchsorted(self.offsets, np.arange(start, start + len(tokens)), side="right")
        return tokens, (documents - documents[0]).astype(np.int32)


def open(store: Store, id_: str) -> Windows:
    """A packing that was built; StoreError if it, or its corpus, was not."""
    result = store.folder("packing", id_).required()
    manifest = files.read_json(result / files.MANIFEST)
    source = corpus.result(store, manifest["corpus"])
    dtype = np.dtype(files.read_json(source / files.MANIFEST)["dtype"]).newbyteorder("<")
    return Windows(
        seq_len=manifest["seq_len"],
        starts=_map(result / "starts.bin", np.dtype("<i8")),
        tokens=_map(source / "tokens.bin", dtype),
        offsets=_map(source / "offsets.bin", np.dtype("<i8")),
    )


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A file as an array that is read as it is used. An empty file cannot be mapped: it is an empty array."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return np.empty(0, dtype)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)
