"""Which stages to start next: a pure function of the tree and of what has ended.

Stages on the longest remaining path go first (Hippo, Shin et al., PVLDB 15(5), 2022), so that a study is not left
waiting for one long chain. Several stages may share a *job*, one child process that runs them one after another:
evals, because importing lm_eval takes seconds, and stages shorter than starting them is worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from zexp.study.launch.base import Size, Stage

TINY_SECONDS = 2.0  # shorter stages of one kind may share a job …
TINY_JOB_SECONDS = 10.0  # … of at most so long
EVAL_PART_SECONDS = 8.0  # evals of one state are spread over idle slots in parts of at least so long (lm_eval: ~4 s)
EVAL_JOB_SECONDS = 30.0  # evals of several states share a job of at most so long, while more wait than slots are idle


@dataclass(frozen=True)
class Job:
    """Stages that one child process runs one after another; none waits for another of them, all have one size."""

    stages: tuple[Stage, ...]

    @property
    def size(self) -> Size:
        return self.stages[0].size

    @property
    def cost(self) -> float:
        return sum(stage.cost for stage in self.stages)


class Schedule:
    """The state of a launch: every stage is waiting, running or ended.

    Raises ValueError for a duplicate id or a parent that is listed after its child.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages: dict[str, Stage] = {}
        for stage in stages:
            if stage.id in self.stages:
                raise ValueError(f"stage {stage.id} is listed twice")
            self.stages[stage.id] = stage
        seen: set[str] = set()
        for stage in stages:
            late = [p for p in stage.parents if p in self.stages and p not in seen]
            if late:
                raise ValueError(f"stage {stage.id} is listed before its parent {late[0]}")
            seen.add(stage.id)
        self._parents = {s.id: [p for p in s.parents if p in self.stages] for s in stages}
        self._children: dict[str, list[str]] = {s.id: [] for s in stages}
        for stage_id, parents in self._parents.items():
            for parent in parents:
                self._children[parent].append(stage_id)
        self.rank = self._ranks()
        self._position = {stage_id: n for n, stage_id in enumerate(self.stages)}
        self._waiting = dict.fromkeys(self.stages)
        self._elsewhere: set[str] = set()  # of those that wait
        self._running: set[str] = set()
        self._done: set[str] = set()

    def _ranks(self) -> dict[str, float]:
        """Seconds from a stage's start to the end of the longest chain below it, by stage."""
        rank: dict[str, float] = {}
        for stage_id in reversed(self.stages):
            below = max((rank[child] for child in self._children[stage_id]), default=0.0)
            rank[stage_id] = self.stages[stage_id].cost + below
        return rank

    @property
    def finished(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self._waiting and not self._running

    def unfinished(self) -> list[Stage]:
        return [stage for stage in self.stages.values() if stage.id in self._waiting or stage.id in self._running]

    def ready(self) -> list[Stage]:
        """Stages that can start: their parents are in place, nobody else has them. The longest remaining path first."""
        waiting = [s for s in self._waiting if s not in self._elsewhere]
        found = [self.stages[s] for s in waiting if all(p in self._done for p in self._parents[s])]
        return sorted(found, key=lambda stage: (-self.rank[stage.id], self._position[stage.id]))

    def jobs(self, idle: int) -> list[Job]:
        """What `idle` slots should do: at most so many jobs, the most urgent first. Nothing is started by asking."""
        ready = self.ready()
        by_size: dict[Size, list[Stage]] = {}
        for stage in ready:
            by_size.setdefault(stage.size, []).append(stage)
        jobs = [job for stages in by_size.values() for job in group(stages, idle)]
        if len(by_size) > 1:
            place = {stage.id: n for n, stage in enumerate(ready)}
            jobs.sort(key=lambda job: min(place[stage.id] for stage in job.stages))
        return jobs[:idle]

    def start(self, job: Job) -> None:
        for stage in job.stages:
            del self._waiting[stage.id]
            self._running.add(stage.id)

    def elsewhere(self) -> list[Stage]:
        """Waiting stages that another process has in hand."""
        return [self.stages[s] for s in self._waiting if s in self._elsewhere]

    def leave(self, stage_id: str) -> None:
        """Another process has a waiting stage in hand: it is not ready until take_back()."""
        self._elsewhere.add(stage_id)

    def take_back(self, stage_id: str) -> None:
        self._elsewhere.discard(stage_id)

    def requeue(self, stage_id: str) -> None:
        """A running stage did not end: it may be started again."""
        self._running.remove(stage_id)
        self._waiting[stage_id] = None

    def end(self, stage_id: str, done: bool) -> list[Stage]:
        """A stage ended; returns the descendants that are skipped because it is not done."""
        self._running.discard(stage_id)
        self._waiting.pop(stage_id, None)
        self._elsewhere.discard(stage_id)
        if done:
            self._done.add(stage_id)
            return []
        return self._give_up_below(stage_id)

    def _give_up_below(self, stage_id: str) -> list[Stage]:
        below: set[str] = set()
        stack = [stage_id]
        while stack:
            for child in self._children[stack.pop()]:
                if child in self._waiting and child not in below:
                    below.add(child)
                    stack.append(child)
        for skipped in below:
            del self._waiting[skipped]
        return [stage for stage in self.stages.values() if stage.id in below]


def group(ready: Sequence[Stage], idle: int) -> list[Job]:
    """The ready stages as jobs, the most urgent first (`ready` is in that order), with `idle` slots to fill.

    Evals of one state share a job, unless slots would stay idle and a part is long enough; when more evals wait than
    slots are idle, several states share one. Tiny stages of one kind share a job when there are more of them than slots.
    Where nothing is known about the costs, only evals of one state are put together.
    """
    bundles: dict[tuple[str, ...], list[Stage]] = {}
    for stage in ready:
        bundles.setdefault(_key(stage), []).append(stage)
    jobs = [Job(tuple(stages)) for stages in bundles.values()]
    jobs = _join(jobs, "eval", EVAL_JOB_SECONDS, idle)
    for kind in dict.fromkeys(stage.kind for stage in ready if _tiny(stage)):
        jobs = _join(jobs, kind, TINY_JOB_SECONDS, idle)
    while len(jobs) < idle:
        wide = [job for job in jobs if len(job.stages) > 1 and job.cost >= 2 * EVAL_PART_SECONDS]
        if not wide:
            break
        widest = max(wide, key=lambda job: job.cost)
        place = jobs.index(widest)
        jobs[place : place + 1] = _halves(widest)
    return jobs


def _key(stage: Stage) -> tuple[str, ...]:
    """Stages with equal keys belong into one job."""
    return ("eval", *stage.parents) if stage.kind == "eval" else ("stage", stage.id)


def _tiny(stage: Stage) -> bool:
    return stage.kind != "eval" and 0 < stage.cost < TINY_SECONDS


def _join(jobs: list[Job], kind: str, most: float, idle: int) -> list[Job]:
    """Jobs with those of one kind put together, each at most `most` seconds long, while there are more than slots."""

    def joinable(job: Job) -> bool:
        known = all(stage.kind == kind and stage.cost > 0 for stage in job.stages)
        return known and (kind == "eval" or all(_tiny(stage) for stage in job.stages))

    surplus = len(jobs) - max(idle, 1)
    joined: list[Job] = []
    last: int | None = None  # place in `joined` of the job that is being filled
    for job in jobs:
        if last is not None and surplus > 0 and joinable(job) and joined[last].cost + job.cost <= most:
            joined[last] = Job(joined[last].stages + job.stages)
            surplus -= 1
            continue
        if joinable(job):
            last = len(joined)
        joined.append(job)
    return joined


def _halves(job: Job) -> list[Job]:
    """The same stages as two jobs of about the same length, each in the job's order."""
    sides: tuple[set[str], set[str]] = (set(), set())
    costs = [0.0, 0.0]
    for stage in sorted(job.stages, key=lambda stage: -stage.cost):
        side = 0 if costs[0] <= costs[1] else 1
        sides[side].add(stage.id)
        costs[side] += stage.cost
    return [Job(tuple(stage for stage in job.stages if stage.id in side)) for side in sides]
