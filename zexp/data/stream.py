"""What a trajectory reads: its item-th sequence, found through the chain of its segments in O(depth).

A segment's stream is one of
- a *continuation*, [{replay: parent, start: continue, weight: 4096}]: item k is the parent's item n0 + k, where n0 is
  how many items the parent had read at the fork;
- a *mix* of packings and at most one replay of the parent.  Its table starts at 0; a packing's windows go on after the
  highest one that any ancestor has read; a replay's k-th item is the parent's item n0 + k (continue) or item k of the
  stream that the parent reads (beginning).

Nothing here knows a horizon, a phase's name or a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from zexp.data import mix, order

NUMERICS = {"data.replay": 1}


def is_continuation(streams: Sequence[Mapping[str, Any]]) -> bool:
    """True if a segment's `streams` say: go on reading what the parent reads, from where it stopped."""
    return len(streams) == 1 and streams[0].get("start") == "continue"


def numerics(streams: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The numerics numbers that decide what `streams` read; a continuation adds nothing to its parent's."""
    used: dict[str, int] = {}
    if is_continuation(streams):
        return used
    for entry in streams:
        used |= mix.NUMERICS | (order.NUMERICS if "packing" in entry else NUMERICS)
    return used


class Segment(NamedTuple):
    """One segment of a chain: a trajectory's id and its semantic block."""

    id: str
    semantic: Mapping[str, Any]


class Window(NamedTuple):
    """The window-th window of a packing, in the order of `seed`."""

    packing: str
    seed: int
    window: int


class Location(NamedTuple):
    """A window, and where it lies on disk."""

    packing: str
    seed: int
    window: int
    epoch: int
    bin: int


class Span(NamedTuple):
    """The windows first..stop-1 of a packing, and whether they were read by way of a replay."""

    packing: str
    seed: int
    first: int
    stop: int
    replayed: bool


class Stream:
    """The reading order of a chain of segments, root first.

    chain: a Segment each, or (id, semantic block).
    bins: the number of bins of each packing, needed only by locate().
    ValueError where the chain does not hang together: these are our own invariants, the plan made it.
    """

    def __init__(self, chain: Sequence[tuple[str, Mapping[str, Any]]], bins: Mapping[str, int] | None = None):
        if not chain:
            raise ValueError("a stream needs at least the root segment")
        self.bins = dict(bins or {})
        self._links = [_Link(Segment(*segment)) for segment in chain]
        for position, link in enumerate(self._links):
            link.join(self._links[position - 1] if position else None)
            link.carry(self._highest(position))

    @property
    def seq_len(self) -> int:
        """Labels per item in the last segment."""
        return self._links[-1].seq_len

    @property
    def ids(self) -> tuple[str, ...]:
        """The trajectory ids of the chain, root first."""
        return tuple(link.id for link in self._links)

    @property
    def start(self) -> int:
        """Tokens at which the last segment begins."""
        return self._links[-1].start

    def item_at(self, tokens: int) -> int:
        """The last segment's first item at or after `tokens`, which must be a whole number of sequences into it."""
        item, rest = divmod(tokens - self.start, self.seq_len)
        if item < 0 or rest:
            raise ValueError(f"{tokens} tokens is no item boundary of a segment that starts at {self.start}")
        return item

    def window(self, item: int) -> Window:
        """The window that the last segment's item-th sequence reads."""
        return self._window(len(self._links) - 1, item)

    def locate(self, item: int) -> Location:
        """As window(), with its epoch and its bin on disk."""
        packing, seed, window = self.window(item)
        epoch, bin_ = order.locate(seed, packing, window, self.bins[packing])
        return Location(packing, seed, window, epoch, bin_)

    def consumed(self, tokens: int) -> dict[str, int]:
        """The cursors of a state at `tokens` (in the last segment): per packing, the highest window read plus one."""
        items = self.item_at(tokens)
        last = len(self._links) - 1
        cursors = self._highest(last)
        for span in self.spans(last, 0, items):
            cursors[span.packing] = max(cursors.get(span.packing, 0), span.stop)
        return dict(sorted(cursors.items()))

    def spans(self, segment: int, first: int, stop: int, replayed: bool = False) -> Iterator[Span]:
        """The windows behind items first..stop-1 of a segment of the chain; O(segments x sources)."""
        link = self._links[segment]
        before, after = link.table.counts(first), link.table.counts(stop)
        for stream, start, end in zip(link.streams, before, after, strict=True):
            if start == end:
                continue
            if isinstance(stream, _Fresh):
                cursor = link.cursors[stream.packing]
                yield Span(stream.packing, stream.seed, cursor + start, cursor + end, replayed)
            else:
                source, offset = self._viewed(segment, stream)
                yield from self.spans(source, offset + start, offset + end, replayed or not link.continuation)

    def history(self, tokens: int) -> Iterator[tuple[int, Span]]:
        """(position in the chain, span) of everything read from the root up to `tokens` of the last segment."""
        last = len(self._links) - 1
        for position in range(last + 1):
            stop = self.item_at(tokens) if position == last else self._links[position + 1].items_before
            for span in self.spans(position, 0, stop):
                yield position, span

    def _window(self, segment: int, item: int) -> Window:
        while True:
            link = self._links[segment]
            source, index = link.table.source_of(item)
            stream = link.streams[source]
            if isinstance(stream, _Fresh):
                return Window(stream.packing, stream.seed, link.cursors[stream.packing] + index)
            segment, offset = self._viewed(segment, stream)
            item = offset + index

    def _viewed(self, segment: int, replay: _Replay) -> tuple[int, int]:
        """(segment, offset) such that the replay's k-th item is that segment's item offset + k."""
        if replay.start == "continue":
            return segment - 1, self._links[segment].items_before
        origin = segment - 1
        while self._links[origin].continuation:  # a continuation has no stream of its own: what it continues does
            origin -= 1
        return origin, 0

    def _highest(self, segment: int) -> dict[str, int]:
        """Per packing, the highest window read by the segments before this one, plus one."""
        cursors: dict[str, int] = {}
        for position in range(segment):
            stop = self._links[position + 1].items_before
            for span in self.spans(position, 0, stop):
                cursors[span.packing] = max(cursors.get(span.packing, 0), span.stop)
        return cursors


@dataclass(frozen=True)
class _Fresh:
    packing: str
    seed: int


@dataclass(frozen=True)
class _Replay:
    start: str


class _Link:
    """A segment, read once: its streams, its table, where it starts, and its cursors."""

    def __init__(self, segment: Segment):
        semantic = segment.semantic
        self.id = segment.id
        self.parent: Mapping[str, Any] | None = semantic["parent"]
        self.start = self.parent["tokens"] if self.parent else 0
        self.seq_len: int = semantic["seq_len"]
        self.items_before = 0  # items that the parent has read at this segment's start
        self.cursors: dict[str, int] = {}
        entries = semantic["streams"]
        self.table = mix.table(tuple(entry["weight"] for entry in entries))
        self.streams = [self._stream(entry) for entry in entries]
        if sum(entry["weight"] for entry in entries) != mix.PARTS:
            raise ValueError(f"segment {self.id}: the weights of its streams do not sum to {mix.PARTS}")
        self.continuation = is_continuation(entries)
        if len(set(map(str, self.streams))) < len(self.streams):
            raise ValueError(f"segment {self.id}: names one stream twice; add their weights")

    def _stream(self, entry: Mapping[str, Any]) -> _Fresh | _Replay:
        if "packing" in entry:
            return _Fresh(entry["packing"], entry["seed"])
        if self.parent is None or entry["replay"] != self.parent["id"]:
            raise ValueError(f"segment {self.id}: replays {entry['replay']}, which is not its parent")
        if entry["start"] not in ("continue", "beginning"):
            raise ValueError(f"segment {self.id}: replay.start = {entry['start']!r}")
        return _Replay(entry["start"])

    def join(self, parent: _Link | None) -> None:
        """Tie this segment to the one before it in the chain."""
        expected = self.parent["id"] if self.parent else None
        if (parent.id if parent else None) != expected:
            raise ValueError(f"segment {self.id}: its parent is {expected}, the chain has {parent and parent.id}")
        if parent is None:
            return
        if parent.seq_len != self.seq_len and any(isinstance(stream, _Replay) for stream in self.streams):
            raise ValueError(f"segment {self.id}: replays sequences of {parent.seq_len} as {self.seq_len}")
        self.items_before, rest = divmod(self.start - parent.start, parent.seq_len)
        if self.items_before < 0 or rest:
            raise ValueError(f"segment {self.id}: starts at {self.start}, inside a sequence of its parent")

    def carry(self, cursors: dict[str, int]) -> None:
        """Go on after the windows that the ancestors have read."""
        self.cursors = {s.packing: cursors.get(s.packing, 0) for s in self.streams if isinstance(s, _Fresh)}
