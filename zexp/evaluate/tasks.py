"""The `tasks` stage: the documents of one task, and what a model that knows nothing would score on them.

result/documents.jsonl   one item a line, as builders.py says
result/baselines.json    {metric: {chance?, baseline?, baseline_is?, neighbours?}}
result/manifest.json     {items, …checksums}
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from zexp.data import corpus, tokenizer
from zexp.evaluate import builders
from zexp.store import files
from zexp.store.attempt import Attempt
from zexp.store.folder import StageFolder, Store

DOCUMENTS, BASELINES = "documents.jsonl", "baselines.json"
_WORD = re.compile(r" [a-z]{3,}")


def run(store: Store, folder: StageFolder, request: dict[str, Any], attempt: Attempt) -> str:
    """The stage. Raises ValueError if the held-out text is too little for the task."""
    semantic = folder.semantic()
    tokenizer.one_thread()
    items, baselines = _build(store, semantic)
    scratch = attempt.scratch("tasks")
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    files.write_atomic(scratch / DOCUMENTS, lines)
    files.write_json(scratch / BASELINES, baselines)
    files.write_json(scratch / files.MANIFEST, {"items": len(items), "task": semantic["task"]})
    attempt.progress(len(items), len(items), "items")
    attempt.publish(scratch, "result")
    return "done"


def _build(store: Store, semantic: dict[str, Any]) -> tuple[list[builders.Item], dict[str, Any]]:
    """(items, baselines)."""
    options = dict(semantic["documents"])
    builder = builders.BUILDERS[options.pop("builder")](**options)
    if isinstance(builder, builders.Recall):
        return _recall(builder, tokenizer.load(store, semantic["tokenizer"]))
    heldout = list(corpus.read_heldout(store, semantic["corpus"]))
    if isinstance(builder, builders.BitsPerByte):
        items = builders.bits_per_byte(heldout, builder)
        if not items:
            raise ValueError(
                f"{semantic['task']}: none of the source's documents are held out, so there is nothing to score. Raise "
                "corpus.heldout, or cut the source into smaller documents (documents: paragraph)."
            )
        counts = token_counts(store, semantic["corpus"])
        eod = tokenizer.eod_id(store, semantic["tokenizer"])
        baseline = unigram_bits_per_byte(items, tokenizer.load(store, semantic["tokenizer"]), counts, eod)
        text = "a unigram model: the tokenizer's tokens by their counts in the training corpus"
        return items, {"bits_per_byte": {"baseline": baseline, "baseline_is": text}}
    if isinstance(builder, builders.Docstrings):
        items = builders.docstrings(heldout, builder)
        return items, {"acc": _of_ring(builder.choices)}
    encoder = tokenizer.load(store, semantic["tokenizer"])
    items = builders.last_words(heldout, lambda word: len(tokenizer.encode(encoder, [word])[0]) == 1, builder)
    frequent = {"baseline": builders.most_frequent(items), "baseline_is": "the choice that is most often a last word"}
    return items, {"acc": {**_of_ring(builder.choices), **frequent}}


def _recall(builder: builders.Recall, encoder: Tokenizer) -> tuple[list[builders.Item], dict[str, Any]]:
    decoded = (encoder.decode([id_]) for id_ in range(tokenizer.vocab_size(encoder)))
    words = [word for word in decoded if _WORD.fullmatch(word)]
    return builders.recall(words, builder), {"acc": {"chance": 1 / builder.pairs}}


def _of_ring(choices: int) -> dict[str, Any]:
    """neighbours: items so near to each other in the ring share choices, and their errors are not independent."""
    return {"chance": 1 / choices, "neighbours": choices - 1}


def token_counts(store: Store, corpus_id: str) -> np.ndarray:
    """How often each token occurs in a corpus, (V,), the eod left out."""
    result = corpus.result(store, corpus_id)
    manifest = files.read_json(result / files.MANIFEST)
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    tokens = np.memmap(result / "tokens.bin", dtype=dtype, mode="r")
    counts = np.zeros(int(tokens.max()) + 1, dtype=np.int64)
    for start in range(0, len(tokens), 2**24):  # bincount makes int64 of what it counts
        counts += np.bincount(tokens[start : start + 2**24], minlength=len(counts))
    counts[tokenizer.eod_id(store, manifest["tokenizer"])] = 0
    return counts


def unigram_bits_per_byte(items: list[builders.Item], encoder: Tokenizer, counts: np.ndarray, eod: int) -> float:
    """Bits per byte of a unigram model with add-one smoothing over the vocabulary but the eod."""
    vocabulary = tokenizer.vocab_size(encoder)
    smoothed = np.ones(vocabulary)
    smoothed[: len(counts)] += counts
    smoothed[eod] = 0.0
    with np.errstate(divide="ignore"):
        bits = -np.log2(smoothed / smoothed.sum())
    encoded = tokenizer.encode(encoder, [item["text"] for item in items])
    total = math.fsum(float(bits[id_]) for ids in encoded for id_ in ids)
    return total / sum(len(item["text"].encode()) for item in items)
