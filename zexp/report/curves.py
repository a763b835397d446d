"""Loss and learning-rate curves over tokens, one a trajectory: what variants share is drawn once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zexp.store.folder import StageFolder
from zexp.train.schedule import lr

POINTS = 800  # of a drawn loss curve: more cannot be seen, and a page should open at once
LR_POINTS = 48  # of a curved piece of the schedule

Point = tuple[int, float | None]


@dataclass
class Curve:
    """A trajectory's points. loss: (tokens, nats a token; None = not finite); averaged: points a drawn one stands for."""

    trajectory: str
    loss: list[Point]
    lr: list[Point]
    averaged: int = 1


def read_curve(
    folder: StageFolder, trajectory: str, start: int, end: int, pieces: Sequence[Mapping[str, Any]]
) -> Curve:
    """The curve of a trajectory that covers [start, end]; pieces: its schedule, empty if it has not started."""
    attempts = [
        [(int(line["tokens"]), line["loss"]) for line in attempt.metrics() if "tokens" in line and "loss" in line]
        for attempt in folder.attempts()
    ]
    points = [point for point in merge(attempts) if start <= point[0] <= end]
    thinned, averaged = thin(points, POINTS)
    return Curve(trajectory, thinned, lr_points(pieces, end), averaged)


def merge(attempts: Iterable[Sequence[Point]]) -> list[Point]:
    """One curve from attempts, oldest first: a later one replaces the tokens that it trained again, and no others."""
    merged: list[Point] = []
    for points in attempts:
        if points:
            first, last = points[0][0], points[-1][0]
            merged = sorted([p for p in merged if not first <= p[0] <= last] + list(points), key=lambda p: p[0])
    return merged


def thin(points: Sequence[Point], limit: int) -> tuple[list[Point], int]:
    """At most `limit` points, each the mean of as many neighbours (also returned) at the last one's tokens.

    A value that is not finite stays visible: its whole group is None.
    """
    size = max(1, math.ceil(len(points) / limit))
    thinned: list[Point] = []
    for i in range(0, len(points), size):
        group = points[i : i + size]
        values = [value for _, value in group if value is not None]
        mean = math.fsum(values) / len(values) if len(values) == len(group) else None
        thinned.append((group[-1][0], None if mean is None else float(f"{mean:.5g}")))
    return thinned, size


def lr_points(pieces: Sequence[Mapping[str, Any]], end: int) -> list[Point]:
    """The schedule up to `end`, as a polyline: straight pieces by their ends, curved ones sampled."""
    points: list[Point] = []
    for piece in pieces:
        first, last = piece["from"], end if piece["to"] is None else min(end, piece["to"])
        if last < first:
            break
        steps = 1 if piece["shape"] in ("constant", "linear") else LR_POINTS
        for k in range(steps + 1):
            tokens = first + (last - first) * k / steps
            points.append((round(tokens), float(f"{lr([piece], tokens):.6g}")))
    return points
