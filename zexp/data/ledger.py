"""What a trajectory has read: tokens, epochs and repeats per packing, and how much of each segment was replay.

Counted from the spans of the stream, not by walking the items: a ledger of 10^12 tokens costs the same as one of 10^6.
A token is a label: a window of seq_len labels counts seq_len.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from zexp.data import order
from zexp.data.stream import Span, Stream


@dataclass(frozen=True)
class Account:
    """One packing's part in a trajectory."""

    packing: str
    tokens: int  # labels read, repeats included
    unique: int  # labels of distinct bins
    replayed: int  # labels that came by way of a replay
    epochs: float  # tokens / the packing's tokens

    @property
    def repeated(self) -> int:
        """Labels read again after their first time."""
        return self.tokens - self.unique


@dataclass(frozen=True)
class SegmentAccount:
    """One segment's part: how much it reads, and how much of that is its parent's stream."""

    id: str
    tokens: int
    replayed: int
    tokens_of: Mapping[str, int]  # by packing

    @property
    def replay_fraction(self) -> float:
        """The realised fraction; a continuation replays nothing, it goes on."""
        return self.replayed / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class Ledger:
    """The accounts of a whole chain up to a token count."""

    packings: Mapping[str, Account]
    segments: tuple[SegmentAccount, ...]

    @property
    def tokens(self) -> int:
        """Labels read in all."""
        return sum(segment.tokens for segment in self.segments)


@dataclass(frozen=True)
class Cap:
    """How often a packing may be read. bins: exact when `built`, else an upper bound from the source's bytes."""

    name: str
    bins: int
    max_epochs: int | None
    built: bool


def ledger(stream: Stream, tokens: int, bins: Mapping[str, int]) -> Ledger:
    """Everything that `stream`'s chain has read when its last segment stands at `tokens`.

    bins: per packing, its number of bins (all of them at least 1).
    """
    seq_len = stream.seq_len
    spans: dict[str, list[Span]] = defaultdict(list)
    by_segment: list[list[Span]] = [[] for _ in stream.ids]
    for position, span in stream.history(tokens):
        spans[span.packing].append(span)
        by_segment[position].append(span)
    accounts = {
        packing: Account(
            packing=packing,
            tokens=_length(read) * seq_len,
            unique=distinct_bins(read, bins[packing]) * seq_len,
            replayed=_length(span for span in read if span.replayed) * seq_len,
            epochs=_length(read) / bins[packing],
        )
        for packing, read in sorted(spans.items())
    }
    segments = tuple(
        SegmentAccount(
            id=id_,
            tokens=_length(read) * seq_len,
            replayed=_length(span for span in read if span.replayed) * seq_len,
            tokens_of=_tokens_of(read, seq_len),
        )
        for id_, read in zip(stream.ids, by_segment, strict=True)
    )
    return Ledger(accounts, segments)


def check(stream: Stream, tokens: int, caps: Mapping[str, Cap]) -> list[str]:
    """What a plan must refuse: packings that would be read more often than their cap allows, one text each."""
    read: dict[str, int] = defaultdict(int)
    for _, span in stream.history(tokens):
        read[span.packing] += span.stop - span.first
    problems = []
    for packing, windows in sorted(read.items()):
        cap = caps[packing]
        if cap.bins == 0:
            problems.append(
                f"source {cap.name}: it has less than one sequence of {stream.seq_len} tokens. "
                "Give it more text, or lower seq_len."
            )
        elif cap.max_epochs is not None and windows > cap.bins * cap.max_epochs:
            has = f"{'' if cap.built else 'at most '}{cap.bins * stream.seq_len:,} tokens"
            problems.append(
                f"source {cap.name}: the run reads {windows * stream.seq_len:,} tokens of it, which is "
                f"{windows / cap.bins:.3g} epochs; it has {has} and max_epochs is {cap.max_epochs}. "
                "Train shorter, lower its weight, add text, or raise max_epochs (null: no cap)."
            )
    return problems


def distinct_bins(spans: Iterable[Span], bins: int) -> int:
    """How many different bins the spans read, exactly."""
    by_epoch: dict[tuple[int, int], int] = defaultdict(int)
    parts: list[tuple[int, int, int, int]] = []  # (seed, epoch, first, stop)
    packing = ""
    for packing, seed, first, stop in _merged(spans):
        for epoch in range(first // bins, (stop - 1) // bins + 1):
            low, high = max(first, epoch * bins), min(stop, (epoch + 1) * bins)
            by_epoch[seed, epoch] += high - low
            if by_epoch[seed, epoch] == bins:
                return bins  # a whole epoch: nothing is left to find
            parts.append((seed, epoch, low - epoch * bins, high - epoch * bins))
    if len(by_epoch) <= 1:
        return sum(by_epoch.values())
    # Several epochs, none whole (a cursor that started late): their orders differ, so the bins have to be looked at.
    seen = {
        order.bin_of(seed, packing, epoch, index, bins)
        for seed, epoch, low, high in parts
        for index in range(low, high)
    }
    return len(seen)


def _merged(spans: Iterable[Span]) -> list[tuple[str, int, int, int]]:
    """(packing, seed, first, stop) of disjoint ranges that cover the spans."""
    merged: list[tuple[str, int, int, int]] = []
    for packing, seed, first, stop, _ in sorted(spans):
        if merged and merged[-1][:2] == (packing, seed) and first <= merged[-1][3]:
            merged[-1] = (packing, seed, merged[-1][2], max(stop, merged[-1][3]))
        else:
            merged.append((packing, seed, first, stop))
    return merged


def _length(spans: Iterable[Span]) -> int:
    return sum(span.stop - span.first for span in spans)


def _tokens_of(spans: Iterable[Span], seq_len: int) -> dict[str, int]:
    tokens: dict[str, int] = defaultdict(int)
    for span in spans:
        tokens[span.packing] += (span.stop - span.first) * seq_len
    return dict(sorted(tokens.items()))
