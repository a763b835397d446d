"""The chain of segments that a trajectory consists of, from the store."""

from collections.abc import Mapping
from typing import Any

from zexp.data.stream import Segment
from zexp.store.folder import Store


def chain(store: Store, trajectory_id: str) -> list[Segment]:
    """The segments from the root to this one. Every ancestor's folder must exist (StoreError)."""
    segments: list[Segment] = []
    next_id: str | None = trajectory_id
    while next_id is not None:
        semantic = store.folder("trajectory", next_id).semantic()
        segments.append(Segment(next_id, semantic))
        next_id = semantic["parent"]["id"] if semantic["parent"] else None
    return segments[::-1]


def start_tokens(semantic: Mapping[str, Any]) -> int:
    """Where a segment begins, in tokens since the root's initial weights."""
    return int(semantic["parent"]["tokens"]) if semantic["parent"] else 0


def batch_tokens(semantic: Mapping[str, Any], tokens: int) -> int:
    """Tokens of the optimizer step that begins at `tokens`."""
    return int([piece for piece in semantic["batch"] if piece["from"] <= tokens][-1]["tokens"])


def is_step_boundary(semantic: Mapping[str, Any], tokens: int) -> bool:
    """True if an optimizer step ends at `tokens` (or the segment begins there)."""
    if tokens < start_tokens(semantic):
        return False
    # A piece of the batch schedule begins where the one before it ends: look at the one that `tokens` ends.
    pieces = [piece for piece in semantic["batch"] if piece["from"] < tokens] or [semantic["batch"][0]]
    return bool((tokens - pieces[-1]["from"]) % pieces[-1]["tokens"] == 0)
