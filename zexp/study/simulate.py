"""How long stages take on a number of slots: list scheduling, the longest remaining path first. Pure.

The order is the local launcher's (launch/scheduler.py); that it puts small stages into one job, and what starting a job
takes, is left out.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Simulation:
    """seconds: from the first start to the last end; chain: the stages of the longest path, whose length no number of slots
    undercuts; chain_seconds: its length.
    """

    seconds: float
    chain: list[str]
    chain_seconds: float


def simulate(seconds: Mapping[str, float], parents: Mapping[str, Sequence[str]], slots: int | None) -> Simulation:
    """seconds: of each stage, parents before children; parents: of each, those that are no stage here are done already.

    slots: stages that run at once, None = any number.
    """
    waits_for = {id: [p for p in parents[id] if p in seconds] for id in seconds}
    children: dict[str, list[str]] = {id: [] for id in seconds}
    for id, before in waits_for.items():
        for parent in before:
            children[parent].append(id)
    rank: dict[str, float] = {}
    for id in reversed(list(seconds)):
        rank[id] = seconds[id] + max((rank[child] for child in children[id]), default=0.0)
    place = {id: n for n, id in enumerate(seconds)}
    left = {id: len(before) for id, before in waits_for.items()}
    ready = [(-rank[id], place[id], id) for id, count in left.items() if count == 0]
    heapq.heapify(ready)
    running: list[tuple[float, int, str]] = []
    now = 0.0
    while ready or running:
        while ready and (slots is None or len(running) < slots):
            _, number, id = heapq.heappop(ready)
            heapq.heappush(running, (now + seconds[id], number, id))
        now, _, ended = heapq.heappop(running)
        for child in children[ended]:
            left[child] -= 1
            if left[child] == 0:
                heapq.heappush(ready, (-rank[child], place[child], child))
    chain = _longest(rank, waits_for, children)
    return Simulation(now, chain, rank[chain[0]] if chain else 0.0)


def _longest(rank: Mapping[str, float], waits_for: Mapping[str, Sequence[str]], children: Mapping[str, Sequence[str]]) -> list[str]:
    roots = [id for id in rank if not waits_for[id]]
    if not roots:
        return []
    chain = [max(roots, key=lambda id: rank[id])]
    while children[chain[-1]]:
        chain.append(max(children[chain[-1]], key=lambda id: rank[id]))
    return chain
