"""Batches read and texts tokenized, timed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from zexp.bench import machine
from zexp.bench.data import TEXT_BYTES, against
from zexp.bench.flags import name_of, place_of
from zexp.bench.progress import progress
from zexp.bench.setting import device_of, setting
from zexp.bench.timing import once, timed
from zexp.data import documents, tokenizer
from zexp.data.stream import Segment
from zexp.store.folder import Store
from zexp.study.plan import packings_read
from zexp.study.resolve import DataStage, Variant
from zexp.train.batches import Batches
from zexp.train.chain import batch_tokens, start_tokens

ENCODED = 32  # documents at a time, as the corpus stage does


def measure(store: Store, variants: Sequence[Variant], options: argparse.Namespace) -> dict[str, Any]:
    """What `zexp bench data --json` prints. What variants share is measured once."""
    tokenizer.one_thread()
    reads: dict[str, tuple[Variant, int]] = {}
    texts: dict[str, tuple[Variant, DataStage]] = {}
    for variant in variants:
        first = 0
        for span in variant.chain.phases:
            reads.setdefault(_what_is_read(variant.chain.segments[first].semantic), (variant, first))
            first = span.last_segment + 1
        texts |= {stage.id: (variant, stage) for stage in variant.data if stage.kind == "corpus"}
    each = options.seconds / (len(reads) + len(texts))
    place = place_of(options, variants[0].run)
    with progress("data", len(reads) + len(texts)) as say, setting(place["threads"]):
        device = device_of(place["device"])
        reading = []
        for variant, first in reads.values():
            say(f"reading {variant.chain.segments[first].phase} of {variant.name}")
            reading.append(_read(store, variant, first, device, each, options.against))
        tokenizing = []
        for variant, stage in texts.values():
            say(f"tokenizing {stage.source}")
            tokenizing.append(_tokenized(store, variant, stage, each))
        about = machine.facts(device)
    return {
        "machine": about, "store": str(store.root), "seconds": options.seconds, "against": options.against,
        "configs": [name_of(one) for one in options.composed], "reading": reading, "tokenizing": tokenizing,
        "not_measured": ["a disk without its cache: the system had read these files before, or reads them ahead."],
    }  # fmt: skip


def _what_is_read(semantic: Mapping[str, Any]) -> str:
    """The same for segments that read the same batches: learning rates do not matter."""
    return json.dumps([semantic[key] for key in ("parent", "streams", "batch", "seq_len")], sort_keys=True)


def _read(store: Store, variant: Variant, first: int, device: str, seconds: float, needed: float | None) -> dict[str, Any]:
    """Of the phase whose first segment that is."""
    segments = variant.chain.segments[: first + 1]
    semantic = segments[-1].semantic
    chain = [Segment(segment.id, segment.semantic) for segment in segments]
    begin = start_tokens(semantic)
    size = batch_tokens(semantic, begin)
    stop = segments[-1].to
    batches: list[Batches] = []
    at = begin

    def read() -> None:
        nonlocal at
        if not batches:
            batches.append(Batches(store, chain, device))
        batches[0].read(at, size)
        at = at + size if at + 2 * size <= stop else begin

    opened = once(read, device)
    times = timed(read, device, seconds=seconds, least=5, most=2000)
    rate = size / times.median
    return {
        "phase": segments[-1].phase, "variant": variant.name, "batch_tokens": size, "seq_len": semantic["seq_len"],
        "sources": [variant.sources[id_] for id_ in packings_read(segments)], "first_seconds": opened, **times.to_json(),
        "tokens_per_second": rate, "against": against(rate, needed),
    }  # fmt: skip


def _tokenized(store: Store, variant: Variant, stage: DataStage, seconds: float) -> dict[str, Any]:
    """Training texts of a corpus, encoded as its stage does; reading and parsing them is not timed."""
    semantic = stage.semantic
    found = documents.sample(
        semantic["source"], semantic["split"]["heldout"], TEXT_BYTES, directory=Path(variant.directory), cache=store.cache
    )
    texts = list(_up_to(found, TEXT_BYTES))
    encoder = tokenizer.load(store, semantic["tokenizer"])
    counted = {"tokens": 0}

    def encode() -> None:
        counted["tokens"] = sum(len(ids) for batch in _batches(texts) for ids in tokenizer.encode(encoder, batch))

    size = sum(len(text.encode()) for text in texts)
    times = timed(encode, seconds=seconds, least=2, most=200)
    return {
        "source": stage.source, "bytes": size, "documents": len(texts), "tokens": counted["tokens"], **times.to_json(),
        "bytes_per_second": size / times.median, "tokens_per_second": counted["tokens"] / times.median,
    }  # fmt: skip


def _up_to(texts: Iterable[str], size: int) -> Iterable[str]:
    """Texts until they are that many bytes together, the first one in any case."""
    taken = 0
    for text in texts:
        yield text
        taken += len(text.encode())
        if taken >= size:
            return


def _batches(texts: Sequence[str]) -> Iterable[list[str]]:
    left = iter(texts)
    while batch := list(islice(left, ENCODED)):
        yield batch
