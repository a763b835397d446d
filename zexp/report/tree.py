"""The tree of trajectories: who forked from whom, at how many tokens, and where to draw each.

Pure: made from the stages, drawn as SVG by the page's template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

LANE, TOP, LEFT = 26.0, 34.0, 14.0  # px
AXIS_WIDTH = 620.0
NARROWEST = 34.0  # px: an interval between two cuts is never drawn shorter, so that its marks can be told apart


@dataclass
class Mark:
    """A token count of a trajectory that a stage ends at."""

    tokens: int
    status: str
    stage: str
    evals: list[str] = field(default_factory=list)  # eval stages of this state
    eval_status: str = ""


@dataclass
class Trajectory:
    """One segment's folder in the tree.

    start: where it begins, the fork's tokens; parent: the trajectory that it continues, by id.
    rows: the rows that train through it; users: the variants (of a state nobody annealed: the pretrained one).
    """

    id: str
    folder: str
    label: str
    start: int
    end: int
    parent: str | None
    rows: list[str]
    users: list[str]
    status: str
    marks: list[Mark]
    lane: float = 0.0

    @property
    def shared(self) -> bool:
        """Trained once for several variants."""
        return len(self.users) > 1


@dataclass
class Drawing:
    """Positions in px. ticks: (x, tokens), stretched: short intervals are not to scale; depth: of the fork elbows."""

    width: float
    height: float
    lanes: int
    x: Mapping[int, float]
    ticks: list[tuple[float, int]]
    stretched: bool

    def y(self, trajectory: Trajectory) -> float:
        return TOP + LANE * (trajectory.lane + 0.5)


def assign_lanes(trajectories: Sequence[Trajectory]) -> int:
    """Give each trajectory its lane; returns how many there are.

    A leaf takes the next free lane; a trajectory whose children all fork at its end lies amid them; one that goes on
    past a fork has a lane of its own, above its children's.
    """
    known = {t.id for t in trajectories}
    children: dict[str | None, list[Trajectory]] = {}
    for trajectory in trajectories:
        parent = trajectory.parent if trajectory.parent in known else None
        children.setdefault(parent, []).append(trajectory)
    free = 0

    def place(trajectory: Trajectory) -> None:
        nonlocal free
        forks = sorted(children.get(trajectory.id, []), key=lambda child: child.start)
        goes_on = any(child.start < trajectory.end for child in forks)
        if not forks or goes_on:
            trajectory.lane = free
            free += 1
        for child in forks:
            place(child)
        if forks and not goes_on:
            trajectory.lane = sum(child.lane for child in forks) / len(forks)

    for root in children.get(None, []):
        place(root)
    return free


def draw(trajectories: Sequence[Trajectory]) -> Drawing:
    """Lanes and the token axis: proportional, but no interval between two cuts narrower than it can be read."""
    lanes = assign_lanes(trajectories)
    cuts = sorted({0} | {t.start for t in trajectories} | {m.tokens for t in trajectories for m in t.marks})
    widths = [b - a for a, b in pairwise(cuts)]
    total = sum(widths) or 1
    wide = [max(NARROWEST, AXIS_WIDTH * w / total) for w in widths]
    x, at = {}, LEFT
    for cut, width in zip(cuts, [*wide, 0.0], strict=True):
        x[cut] = at
        at += width
    ticks: list[tuple[float, int]] = []
    for cut in cuts:
        if not ticks or x[cut] - ticks[-1][0] >= NARROWEST:
            ticks.append((x[cut], cut))
    stretched = any(AXIS_WIDTH * w / total < NARROWEST for w in widths)
    return Drawing(at + LEFT, TOP + LANE * lanes + 14, lanes, x, ticks, stretched)
