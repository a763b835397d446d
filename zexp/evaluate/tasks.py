"""The `tasks` stage: a task's documents, from held-out text that a corpus stage put aside, and what a trivial model scores.

result/documents.jsonl {"id", "text"}   result/baselines.json {metric: {"name", "value"}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from zexp.data import corpus, tokenizer
from zexp.store.attempt import Attempt
from zexp.store.errors import StoreError
from zexp.store.files import read_json, write_json
from zexp.store.folder import StageFolder, Store


def run(store: Store, folder: StageFolder, request: dict[str, Any], attempt: Attempt) -> str:
    """Build the documents and baselines of one task. Raises StoreError if the corpus held nothing out."""
    semantic = folder.semantic()
    options = semantic["documents"]
    tokenizer.one_thread()
    documents = list(_cut(store, semantic["corpus"], options["bytes"], options["longest"]))
    if not documents:
        raise StoreError(f"{semantic['task']}: the corpus {semantic['corpus'][:16]} has no held-out documents to score.")
    scratch = attempt.scratch("result")
    lines = (json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    (scratch / "documents.jsonl").write_text("".join(lines), encoding="utf-8")
    unigram = unigram_bits_per_byte(store, semantic["corpus"], semantic["tokenizer"], [d["text"] for d in documents])
    write_json(scratch / "baselines.json", {"bits_per_byte": {"name": "unigram", "value": unigram}})
    attempt.progress(len(documents), len(documents), "documents")
    attempt.publish(scratch, "result")
    return "done"


def _cut(store: Store, corpus_id: str, total: int, longest: int) -> Iterator[dict[str, str]]:
    """Held-out documents up to a number of bytes in all, long ones cut at a line end."""
    left = total
    for document in corpus.read_heldout(store, corpus_id):
        text = document.text
        if len(text.encode()) > longest:
            head = text.encode()[:longest].decode(errors="ignore")
            text = head[: head.rfind("\n") + 1] or head
        size = len(text.encode())
        if size == 0 or not text.strip():
            continue
        if size > left:
            return
        left -= size
        yield {"id": document.digest.hex()[:16], "text": text}


def unigram_bits_per_byte(store: Store, corpus_id: str, tokenizer_id: str, texts: list[str]) -> float:
    """Bits per byte of a unigram model of the training tokens, add-one smoothed over the vocabulary."""
    result = corpus.result(store, corpus_id)
    manifest = read_json(result / "manifest.json")
    bpe = tokenizer.load(store, tokenizer_id)
    counts = np.ones(bpe.get_vocab_size(), dtype=np.float64)
    tokens = np.memmap(result / "tokens.bin", dtype=manifest["dtype"], mode="r")
    for start in range(0, len(tokens), 1 << 22):  # a memory map is read in pieces: a corpus may be larger than memory
        counts += np.bincount(tokens[start : start + (1 << 22)], minlength=len(counts))
    bits = -np.log2(counts / counts.sum())
    total = sum(float(bits[ids].sum()) for ids in tokenizer.encode(bpe, texts) if ids)
    value = total / sum(len(text.encode()) for text in texts)
    assert math.isfinite(value)
    return value
