"""What can be said of a plan before it runs: queue, time, memory, and why stages are not taken from the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zexp.store.folder import Store
from zexp.study import estimate, fits, hub, nearest
from zexp.study.catalogue import Catalogue
from zexp.study.dispatch import to_launch
from zexp.study.estimate import Estimate
from zexp.study.launch.options import LauncherOptions
from zexp.study.launch.slurm.options import SlurmOptions
from zexp.study.launch.slurm.queue import summary
from zexp.study.measured import Measured
from zexp.study.nearest import Finder, Nearest
from zexp.study.plan import Plan
from zexp.study.queue import Queue, queue_of
from zexp.study.resolve import layout_of
from zexp.study.simulate import Simulation, simulate

DATA_KINDS = ("tokenizer", "corpus", "packing", "tasks")


@dataclass(frozen=True)
class Outlook:
    """simulation: None if the seconds of some stage are not known. device_seconds: of GPUs those that train and score, of CPUs
    the cores of all stages; None likewise.
    """

    plan: Plan
    options: LauncherOptions
    queue: Queue
    estimates: dict[str, Estimate]
    simulation: Simulation | None
    device_seconds: float | None
    needs: list[fits.Need]
    nearest: list[Nearest]
    to_fetch: list[dict[str, Any]]

    @property
    def costs(self) -> dict[str, float]:
        """Seconds of each stage to do, to order them by."""
        return {id: estimate.cost(self.plan.stages[id], one) for id, one in self.estimates.items()}

    def lines(self) -> list[str]:
        """For people. Nothing where nothing is to do."""
        if not self.estimates:
            return []
        said = [self._time(), self._chain(), fits.line(self.needs, self.queue), *self.queue.lines(), self._jobs(), self._fetch()]
        return [text for text in said if text is not None]

    def warnings(self) -> list[str]:
        return fits.warnings(self.needs, self.queue)

    def _time(self) -> str:
        sources = [one.source for one in self.estimates.values()]
        unknown = sorted({one.basis for one in self.estimates.values() if one.source == "unknown"})
        if self.simulation is None or self.device_seconds is None:
            return f"No estimate of the time: {'; '.join(unknown)}."
        slots = self.queue.slots
        on = "with unlimited nodes" if slots is None else f"on {slots} slot{'s' * (slots != 1)}"
        device = "GPU" if self.queue.device == "cuda" else "core"
        text = f"About {say_seconds(self.simulation.seconds)} {on}, {say_hours(self.device_seconds)} {device} hours"
        measured = sources.count("measured")
        if measured == len(sources):
            return f"{text} (measured: all {len(sources)} stages)."
        rest = f"the rest calculated at {self._reckoned()}" if self._reckoned() else "the rest calculated"
        return f"{text} (measured: {measured} of {len(sources)} stages; {rest})."

    def _reckoned(self) -> str:
        """With which speeds models are reckoned to train."""
        stages = self.plan.stages
        bases = [e.basis for id, e in self.estimates.items() if e.source == "calculated" and stages[id].kind == "segment"]
        return " and ".join(dict.fromkeys(bases))

    def _chain(self) -> str | None:
        if self.simulation is None or len(self.simulation.chain) < 2:
            return None
        steps = " → ".join(self.plan.stages[id].label for id in self.simulation.chain)
        return f"Longest chain, {say_seconds(self.simulation.chain_seconds)}: {steps}."

    def _jobs(self) -> str | None:
        """What a cluster would be given."""
        if not isinstance(self.options, SlurmOptions):
            return None
        costs = self.costs
        return summary([to_launch(stage, costs[stage.id]) for stage in self.plan.to_do], self.options)

    def _fetch(self) -> str | None:
        """What this machine would fetch for nodes that do not reach the hub."""
        names = [one["task"]["name"] for one in self.to_fetch]
        return f"To be fetched from the hub before anything is submitted: {', '.join(names)}." if names else None

    def to_json(self) -> dict[str, Any]:
        sources = [one.source for one in self.estimates.values()]
        hours = None if self.device_seconds is None else self.device_seconds / 3600
        return {
            "seconds": None if self.simulation is None else round(self.simulation.seconds, 3),
            "device_hours": hours,
            "estimate": {
                "slots": self.queue.slots,
                "device": self.queue.device,
                **{name: sources.count(name) for name in ("measured", "calculated", "unknown")},
                "mfu": estimate.MFU if self.queue.device == "cuda" else None,
                "core_flops_per_second": estimate.CORE_FLOPS if self.queue.device == "cpu" else None,
                "chain": [] if self.simulation is None else self.simulation.chain,
                "chain_seconds": None if self.simulation is None else round(self.simulation.chain_seconds, 3),
            },
            "queue": self.queue.to_json(),
            "memory": [need.to_json() for need in self.needs],
            "fetch": [one["task"]["name"] for one in self.to_fetch],
            "nearest": [one.to_json() for one in self.nearest],
            "warnings": self.warnings(),
        }


def outlook(plan: Plan, store: Store, options: LauncherOptions, study: str) -> Outlook:
    """Of a plan against its store. Raises ConfigError for what cannot fit the device, and for a device that there is not."""
    queue = queue_of(options, plan)
    needs = fits.needs(plan, queue)
    fits.check(needs, queue)
    catalogue = Catalogue(store)
    found = estimate.estimates(plan, Measured(catalogue, queue.model), queue)
    return Outlook(
        plan,
        options,
        queue,
        found,
        _simulation(plan, found, queue.slots),
        _device_seconds(plan, found, queue),
        needs,
        nearest.nearest(plan, Finder(catalogue), study),
        hub.to_fetch(plan, store) if isinstance(options, SlurmOptions) and options.offline else [],
    )


def _simulation(plan: Plan, found: dict[str, Estimate], slots: int | None) -> Simulation | None:
    """Data first, as a run does it: only the built corpora tell exactly whether the mixes have enough."""
    seconds = {id: one.seconds for id, one in found.items() if one.seconds is not None}
    if len(seconds) < len(found):
        return None
    parents = {id: plan.stages[id].parents for id in seconds}
    data = {id: value for id, value in seconds.items() if plan.stages[id].kind in DATA_KINDS}
    rest = {id: value for id, value in seconds.items() if id not in data}
    whole = simulate(seconds, parents, None)
    at_once = simulate(data, parents, slots).seconds + simulate(rest, parents, slots).seconds
    return Simulation(at_once, whole.chain, whole.chain_seconds)


def _device_seconds(plan: Plan, found: dict[str, Estimate], queue: Queue) -> float | None:
    variants = {variant.name: variant for variant in plan.variants}
    total = 0.0
    for id, one in found.items():
        stage = plan.stages[id]
        if one.seconds is None:
            return None
        if queue.device == "cpu":
            total += one.seconds * int(stage.request["threads"])
        elif stage.kind not in DATA_KINDS:
            total += one.seconds * layout_of(variants[stage.variants[0]].run).devices
    return total


def say_seconds(seconds: float) -> str:
    """11400 -> '3 h 10 min'; the two largest units that matter."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h" + (f" {minutes} min" if minutes else "")
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d" + (f" {hours} h" if hours else "")


def say_hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"
