"""What a report says, as data: rows of cells, comparisons with the baseline, what is not done, and why.

`to_json` is the object that `zexp report --json` prints and leaderboard.json holds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from zexp.report.curves import Curve
from zexp.report.tree import Trajectory

STATUSES = ("done", "missing", "skipped", "diverged", "failed")  # a row has the worst of its seeds', the last here


@dataclass
class Stage:
    """A node of the plan with its status, derived from the store.

    folder, log: relative to the store. reason: why it is not done; error: the traceback's text, of a failed one.
    """

    id: str
    kind: str
    label: str
    phase: str | None
    folder: str
    parents: list[str]
    start: int | None
    to: int | None
    status: str
    reason: str = ""
    log: str | None = None
    traceback: str = ""


@dataclass
class Cell:
    """A score of a row: mean over its seeds with a 95 % interval.

    interval: what the interval is over, "seeds" or (one seed) "items"; None where neither is known. n: seeds;
    by_seed: seed -> score; items: of one seed's evaluation; neighbours: items so near to each other are not
    independent; chance: what guessing scores; reference: what a trivial model scores, with its name; stages: the eval
    stages.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    higher_is_better: bool
    interval: str | None
    by_seed: dict[str, float]
    items: int | None = None
    neighbours: int = 0
    chance: float | None = None
    reference: dict[str, Any] | None = None
    stages: list[str] = field(default_factory=list)


@dataclass
class Row:
    """A variant without its seed, or a pretrained state (anneal None).

    seeds: all that were asked for; by_seed: seed -> status; train_flops, tokens: of one seed.
    segments: seed -> segment stages, root to end.
    """

    name: str
    axes: dict[str, Any]
    arch: str
    anneal: str | None
    pretrained: bool
    status: str
    parameters: dict[str, int]
    tokens: int
    train_flops: float
    seeds: list[int]
    by_seed: dict[str, str]
    metrics: dict[str, Cell]
    segments: dict[str, list[str]]
    evals: dict[str, dict[str, str]]
    fingerprints: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "variant": self.name,
            "axes": self.axes,
            "arch": self.arch,
            "anneal": self.anneal,
            "status": self.status,
            "parameters": self.parameters.get("total"),
            "parameters_active": self.parameters.get("active"),
            "parameters_embedding": self.parameters.get("embedding"),
            "tokens": self.tokens,
            "train_flops": self.train_flops,
            "seeds": self.seeds,
            "status_by_seed": self.by_seed,
            "metrics": {name: asdict(cell) for name, cell in self.metrics.items()},
            "stages": {"segments": self.segments, "evals": self.evals},
            "fingerprints": self.fingerprints,
            "notes": self.notes,
        }


@dataclass
class Pair:
    """A row against its baseline on one metric: difference = row - baseline, with its unadjusted 95 % interval.

    interval: "seeds" (paired by seed, n of them) or "items" (one seed; n items). p_holm: adjusted within the study.
    verdict: better, worse or cannot distinguish; reason: why nothing could be computed, or a caution.
    """

    row: str
    baseline: str
    metric: str
    verdict: str
    higher_is_better: bool
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    interval: str | None = None
    n: int = 0
    p: float | None = None
    p_holm: float | None = None
    reason: str = ""
    mixed_fingerprints: bool = False


@dataclass
class Unfinished:
    """A variant (with its seed) that is not done, and the stage that it stopped at."""

    variant: str
    row: str
    status: str
    stage: str
    reason: str
    folder: str
    log: str | None
    traceback: str


@dataclass
class Report:
    """A study as the store shows it now. store: the folder that every other path is relative to."""

    study: str
    question: str | None
    metric: str | None
    baseline: dict[str, Any]
    revision: int | str | None
    store: str
    rows: list[Row]
    pairs: list[Pair]
    unfinished: list[Unfinished]
    warnings: list[str]
    stages: list[Stage]
    trajectories: list[Trajectory]
    curves: list[Curve]
    metric_names: list[str]

    def ranked(self) -> list[Row]:
        """Rows best first on the study's metric (else the first), those without it last."""
        metric = self.metric if self.metric in self.metric_names else next(iter(self.metric_names), None)

        def rank(row: Row) -> tuple[bool, float]:
            cell = row.metrics.get(metric) if metric is not None else None
            if cell is None:
                return True, 0.0
            return False, -cell.mean if cell.higher_is_better else cell.mean

        return sorted(self.rows, key=rank)

    def arrow(self, metric: str) -> str:
        """Which way a metric is better."""
        cells = (row.metrics[metric] for row in self.rows if metric in row.metrics)
        return "↑" if next(cells).higher_is_better else "↓"

    def to_json(self) -> dict[str, Any]:
        counts = {status: sum(row.status == status for row in self.rows) for status in STATUSES}
        return {
            "study": self.study,
            "question": self.question,
            "metric": self.metric,
            "baseline": self.baseline,
            "revision": self.revision,
            "store": self.store,
            "counts": counts,
            "rows": [row.to_json() for row in self.rows],
            "pairs": [asdict(pair) for pair in self.pairs],
            "failed": [asdict(one) for one in self.unfinished],
            "warnings": self.warnings,
        }
