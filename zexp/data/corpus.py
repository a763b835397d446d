"""A source as one long row of tokens: each document is an eod and then its tokens; a last eod ends the last one.

So the eod that begins a document belongs to it (where documents are masked from each other it is the first thing that a
document sees), and the label of a document's last token is the next one's eod.

Documents are shuffled once, by a hash of the seed and the document: adding a document moves no other relative to the
rest.  `max_bytes` takes the first ones in this order.  Held-out documents are left out, and kept as text beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from zexp.data import documents, embedded
from zexp.data.documents import Document, Tally
from zexp.data.tokenizer import encode, eod_id, load, one_thread, vocab_size
from zexp.store import files
from zexp.store.attempt import Attempt
from zexp.store.folder import StageFolder, Store

_BATCH = 32  # documents encoded at a time


def run(store: Store, folder: StageFolder, request: dict[str, Any], attempt: Attempt) -> str:
    """The stage.

    result/tokens.bin    the tokens, little-endian, of the manifest's dtype
    result/offsets.bin   int64: where each document's eod is, and where the last eod is (documents + 1 numbers)
    result/heldout.jsonl the held-out documents, in shuffled order
    result/manifest.json counts, sizes, dtype, packages, what was dropped and why
    request: directory, what relative file names are relative to (default: the working directory).
    """
    semantic = folder.semantic()
    one_thread()
    tokenizer = load(store, semantic["tokenizer"])
    eod = eod_id(store, semantic["tokenizer"])
    dtype = np.dtype("<u2" if vocab_size(tokenizer) <= 2**16 else "<u4")
    source, seed = semantic["source"], semantic["seed"]
    tally = Tally()
    progress = _Progress(attempt, _bytes(source))

    def read(tally: Tally, on_bytes: Callable[[int], None] | None = None) -> Iterator[Document]:
        return documents.documents(
            source,
            semantic["split"]["heldout"],
            directory=Path(request.get("directory", ".")),
            cache=store.cache,
            tally=tally,
            on_bytes=on_bytes,
        )

    chosen = _first(read(Tally()), seed, source["max_bytes"]) if "max_bytes" in source else None
    heldout: list[tuple[int, Document]] = []
    left_out = _Size()
    scratch = attempt.scratch("corpus")
    row = scratch / "row"  # the documents as they are read
    with row.open("wb") as file:
        written = _Written()
        for batch in _batches(_train(read(tally, progress.read), seed, heldout, chosen, left_out)):
            written.add(batch, tokenizer, eod, dtype, seed, file)
            progress.say(tokens=written.tokens)
            attempt.check()
    _shuffle(row, written, eod, dtype, scratch)
    row.unlink()
    heldout.sort(key=lambda item: item[0])
    with (scratch / "heldout.jsonl").open("w", encoding="utf-8") as out:
        for _, document in heldout:
            out.write(json.dumps(_record(document), ensure_ascii=False) + "\n")
    tokens = written.tokens + 1
    manifest = {
        "tokens": tokens,
        "documents": written.size.documents,
        "bytes": written.size.bytes,
        "bytes_per_token": written.size.bytes / tokens,
        "dtype": dtype.name,
        "tokenizer": semantic["tokenizer"],
        "heldout": {"documents": len(heldout), "bytes": sum(len(d.text.encode()) for _, d in heldout)},
        "beyond_max_bytes": asdict(left_out),
        "duplicates": tally.duplicates,
        "errors": tally.errors,
        "packages": embedded.versions(source["packages"]) if source["kind"] == "embedded" else {},
    }
    files.write_json(scratch / files.MANIFEST, manifest)
    attempt.publish(scratch, "result")
    return "done"


def read_heldout(store: Store, id_: str) -> Iterator[Document]:
    """The held-out documents of a corpus that was built, in shuffled order; StoreError if it was not."""
    with (result(store, id_) / "heldout.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            yield Document(heldout=True, digest=bytes.fromhex(record.pop("digest")), **record)


def result(store: Store, id_: str) -> Path:
    """The folder of a corpus that was built; StoreError if it was not."""
    return store.folder("corpus", id_).required()


@dataclass
class _Size:
    documents: int = 0
    bytes: int = 0

    def add(self, document: Document) -> None:
        self.documents += 1
        self.bytes += len(document.text.encode())


@dataclass
class _Written:
    """The documents in the row so far: each one's place in the shuffled order, and its tokens with the eod."""

    size: _Size = field(default_factory=_Size)
    places: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tokens: int = 0

    def add(
        self, batch: list[Document], tokenizer: Tokenizer, eod: int, dtype: np.dtype[Any], seed: int, file: Any
    ) -> None:
        row: list[int] = []
        for document, ids in zip(batch, encode(tokenizer, [d.text for d in batch]), strict=True):
            self.size.add(document)
            self.places.append(_place(document, seed))
            self.lengths.append(len(ids) + 1)
            self.tokens += len(ids) + 1
            row.append(eod)
            row += ids
        file.write(np.array(row, dtype).tobytes())


@dataclass
class _Progress:
    """Bytes of source read, of those that there are."""

    attempt: Attempt
    total: int
    done: int = 0

    def read(self, size: int) -> None:
        self.done += size

    def say(self, **figures: int) -> None:
        self.attempt.progress(min(self.done, self.total), self.total, "bytes", **figures)


def _train(
    read: Iterable[Document],
    seed: int,
    heldout: list[tuple[int, Document]],
    chosen: set[int] | None,
    left_out: _Size,
) -> Iterator[Document]:
    """The documents to train on; the others go to heldout and left_out."""
    for document in read:
        if document.heldout:
            heldout.append((_place(document, seed), document))
        elif chosen is not None and _place(document, seed) not in chosen:
            left_out.add(document)
        else:
            yield document


def _first(read: Iterable[Document], seed: int, max_bytes: int) -> set[int]:
    """The places of the first training documents in shuffled order that together have at most max_bytes."""
    sizes = sorted((_place(d, seed), len(d.text.encode())) for d in read if not d.heldout)
    chosen, total = set(), 0
    for place, size in sizes:
        total += size
        if total > max_bytes:
            break
        chosen.add(place)
    return chosen


def _place(document: Document, seed: int) -> int:
    """Where a document stands in the shuffled order: any number, uniform in 64 bits."""
    return int.from_bytes(hashlib.sha256(b"%d:%b" % (seed, document.digest)).digest()[:8], "big")


def _shuffle(row: Path, written: _Written, eod: int, dtype: np.dtype[Any], scratch: Path) -> None:
    """tokens.bin and offsets.bin from the row of documents as they were read; memory does not grow with the tokens."""
    order = np.argsort(np.array(written.places, dtype=np.uint64), kind="stable")
    lengths = np.array(written.lengths, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    offsets = np.concatenate([[0], np.cumsum(lengths[order])]).astype("<i8")
    # A file of no bytes cannot be mapped: an empty corpus has its one eod alone.
    read = np.memmap(row, dtype, mode="r") if written.tokens else np.empty(0, dtype)
    with (scratch / "tokens.bin").open("wb") as file:
        for document in order:
            file.write(read[starts[document] : starts[document + 1]].tobytes())
        file.write(np.array([eod], dtype).tobytes())
    (scratch / "offsets.bin").write_bytes(offsets.tobytes())


def _record(document: Document) -> dict[str, str]:
    return {
        "file": document.file,
        "text": document.text,
        "digest": document.digest.hex(),
        "symbol": document.symbol,
        "name": document.name,
        "signature": document.signature,
    }


def _bytes(source: dict[str, Any]) -> int:
    if source["kind"] == "embedded":
        return int(source["files"]["bytes"])
    return sum(row["bytes"] for row in source["files"])


def _batches(read: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in read:
        batch.append(document)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
