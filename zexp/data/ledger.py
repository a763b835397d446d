"""What a trajectory has read: tokens, epochs and repeats per packing, and how much of each segment was replay.

Counted from the spans of the stream, not by walking the items: a ledger of 10^12 tokens costs the same as one of 10^6.
A token is a label: a window of seq_len labels counts seq_len.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zexp.data import order
from zexp.data.stream import Span, Stream


@dataclass(frozen=True)
class Supply:
    """What there is of a packing, and how often it may be read."""

    name: str  # of the source
    bins: int  # exact, or an upper bound from the source's bytes
    exact: bool
    max_epochs: int | None


@dataclass(frozen=True)
class Account:
    """One packing's part in a trajectory."""

    name: str
    packing: str
    tokens: int  # labels read, repeats included
    unique: int  # labels of distinct bins
    replayed: int  # labels that came by way of a replay
    epochs: float  # tokens / the packing's tokens; where the supply is a bound, at least this
    seq_len: int
    exact: bool

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
    tokens_of: Mapping[str, int]  # by source

    @property
    def replay_fraction(self) -> float:
        """The realised fraction; a continuation replays nothing, it goes on."""
        return self.replayed / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class Ledger:
    """The accounts of a whole chain up to a token count, packings by name."""

    supplies: Mapping[str, Supply]  # by packing id
    packings: tuple[Account, ...]
    segments: tuple[SegmentAccount, ...]

    @classmethod
    def of(cls, chain: Sequence[tuple[str, Mapping[str, Any]]], tokens: int, supplies: Mapping[str, Supply]) -> Ledger:
        """Everything that a chain of (id, semantic block), root first, has read when it stands at `tokens`."""
        stream = Stream(chain)
        seq_lens = [semantic["seq_len"] for _, semantic in chain]
        seq_len_of: dict[str, int] = {}  # a packing is of one length
        spans: dict[str, list[Span]] = defaultdict(list)
        by_segment: list[list[Span]] = [[] for _ in chain]
        for position, span in stream.history(tokens):
            spans[span.packing].append(span)
            by_segment[position].append(span)
            seq_len_of[span.packing] = seq_lens[position]
        accounts = [
            Account(
                name=supplies[packing].name,
                packing=packing,
                tokens=_length(read) * seq_len_of[packing],
                unique=distinct_bins(read, supplies[packing].bins) * seq_len_of[packing],
                replayed=_length(span for span in read if span.replayed) * seq_len_of[packing],
                epochs=_length(read) / max(1, supplies[packing].bins),
                seq_len=seq_len_of[packing],
                exact=supplies[packing].exact,
            )
            for packing, read in spans.items()
        ]
        segments = tuple(
            SegmentAccount(
                id=id_,
                tokens=_length(read) * seq_len,
                replayed=_length(span for span in read if span.replayed) * seq_len,
                tokens_of=_tokens_of(read, seq_len, supplies),
            )
            for (id_, _), read, seq_len in zip(chain, by_segment, seq_lens, strict=True)
        )
        accounts.sort(key=lambda account: (account.name, account.packing))
        return cls(supplies, tuple(accounts), segments)

    @property
    def tokens(self) -> int:
        """Labels read in all."""
        return sum(segment.tokens for segment in self.segments)

    def problems(self) -> list[str]:
        """What a plan must refuse: sources that are too short for one sequence or would be read too often."""
        problems = []
        for account in self.packings:
            supply = self.supplies[account.packing]
            if supply.bins == 0:
                problems.append(
                    f"source {supply.name}: it has less than one sequence of {account.seq_len} tokens. "
                    "Give it more text, or lower seq_len."
                )
            elif supply.max_epochs is not None and account.epochs > supply.max_epochs:
                has = f"{'' if supply.exact else 'at most '}{supply.bins * account.seq_len:,} tokens"
                problems.append(
                    f"source {supply.name}: the run reads {account.tokens:,} tokens of it, which is "
                    f"{account.epochs:.3g} epochs; it has {has} and max_epochs is {supply.max_epochs}. "
                    "Train shorter, lower its weight, add text, or raise max_epochs (null: no cap)."
                )
        return problems

    def to_json(self) -> dict[str, Any]:
        """{"sources": [...], "segments": [...]}, for plan --json and variants.json."""
        return {
            "sources": [
                {
                    "name": account.name,
                    "packing": account.packing,
                    "tokens": account.tokens,
                    "unique": account.unique,
                    "repeated": account.repeated,
                    "replayed": account.replayed,
                    "epochs": account.epochs,
                    "exact": account.exact,
                }
                for account in self.packings
            ],
            "segments": [
                {
                    "id": segment.id,
                    "tokens": segment.tokens,
                    "replayed": segment.replayed,
                    "replay_fraction": segment.replay_fraction,
                    "sources": dict(segment.tokens_of),
                }
                for segment in self.segments
            ],
        }


def distinct_bins(spans: Iterable[Span], bins: int) -> int:
    """How many different bins of one packing the spans read, exactly; 0 where there are no bins."""
    if bins == 0:
        return 0
    by_epoch: dict[tuple[int, int], int] = defaultdict(int)
    parts: list[tuple[str, int, int, int, int]] = []  # (packing, seed, epoch, first, stop)
    for packing, seed, first, stop in _merged(spans):
        for epoch in range(first // bins, (stop - 1) // bins + 1):
            low, high = max(first, epoch * bins), min(stop, (epoch + 1) * bins)
            by_epoch[seed, epoch] += high - low
            if by_epoch[seed, epoch] == bins:
                return bins  # a whole epoch: nothing is left to find
            parts.append((packing, seed, epoch, low - epoch * bins, high - epoch * bins))
    if len(by_epoch) <= 1:
        return sum(by_epoch.values())
    # Several epochs, none whole (a cursor that started late): their orders differ, so the bins have to be looked at.
    seen = {
        order.bin_of(seed, packing, epoch, index, bins)
        for packing, seed, epoch, low, high in parts
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


def _tokens_of(spans: Iterable[Span], seq_len: int, supplies: Mapping[str, Supply]) -> dict[str, int]:
    tokens: dict[str, int] = defaultdict(int)
    for span in spans:
        tokens[supplies[span.packing].name] += (span.stop - span.first) * seq_len
    return dict(sorted(tokens.items()))
