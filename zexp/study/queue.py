"""What the stages of a plan would run on: how many at once, on which device. Found without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from zexp.calc import devices
from zexp.config.errors import ConfigError
from zexp.store.provenance import cpu_model
from zexp.study.dispatch import to_launch
from zexp.study.launch import machine
from zexp.study.launch.base import Size
from zexp.study.launch.capacity import Capacity, capacity
from zexp.study.launch.options import LauncherOptions, LocalOptions
from zexp.study.launch.slurm.options import SlurmOptions
from zexp.study.plan import Plan, Stage


@dataclass(frozen=True, kw_only=True)
class Queue:
    """slots: stages at once, None = no bound is known; threads: CPU threads of one; device: cpu or cuda; model: the vendor's
    name of the device, or its key in zexp.calc.devices; memory: bytes of one device (of a CPU: all RAM), available: what of
    it is free for all stages together. None = not known, and then nothing is concluded from it. stated: execution.device_model
    says it, this machine may be another.
    """

    backend: str
    slots: int | None
    threads: int
    device: str
    model: str | None
    stated: bool = False
    memory: int | None
    available: int | None

    @property
    def key(self) -> str | None:
        """The device's key in zexp.calc.devices, if it is there."""
        return None if self.model is None or self.device == "cpu" else devices.named(self.model)

    def lines(self) -> list[str]:
        """For people; a launcher with other resources for each kind of stage says them here."""
        what = self.model or ("GPUs that are not known here" if self.device == "cuda" else "CPUs that are not known here")
        if self.backend != "local":
            return [f"Queue: {self.backend}, {'at most ' + str(self.slots) if self.slots else 'any number of'} jobs at once, {what}."]
        each = "one GPU each" if self.device == "cuda" else f"{self.threads} thread{'s' * (self.threads != 1)} each"
        where = "" if self.stated else " of this machine"
        return [f"Queue: {self.slots} slot{'s' * (self.slots != 1)}{where}, {each}; {what}."]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def queue_of(options: LauncherOptions, plan: Plan) -> Queue:
    """Of the plan's stages under a launcher. Raises ConfigError for an execution.device_model that names no device."""
    stages = plan.to_do or list(plan.stages.values())
    wanted = {str(stage.request["device"]) for stage in stages if "device" in stage.request}
    device = "cuda" if "cuda" in wanted else "auto" if "auto" in wanted else "cpu"
    threads = max((int(stage.request["threads"]) for stage in stages), default=1)
    named = _named(plan, device)
    if not isinstance(options, LocalOptions):
        on = "cpu" if device == "cpu" or not _asks_for_gpus(options) else "cuda"
        found = _of_table(named) if named is not None else (None, None)
        return Queue(
            backend=options.backend,
            slots=options.max_parallel if isinstance(options, SlurmOptions) else None,
            threads=threads,
            device=on,
            model=found[0],
            stated=named is not None,
            memory=found[1],
            available=found[1],
        )
    here = _here(stages, options)
    on_gpus = here is not None and here.gpus is not None
    on = "cuda" if named is not None or on_gpus or device == "cuda" else "cpu"
    model, memory, available = _this_machine(on) if named is None else (*_of_table(named), _of_table(named)[1])
    size = min((to_launch(stage, 0.0).size for stage in stages if stage.kind == "segment"), default=Size(threads))
    most = 1 if here is None else here.slots(size)
    slots = most if named is None or on_gpus else 1  # planned here for another machine
    count = slots if options.slots is None else min(slots, options.slots) if named is None else options.slots
    return Queue(
        backend="local",
        slots=max(count, 1),
        threads=threads,
        device=on,
        model=model,
        stated=named is not None,
        memory=memory,
        available=available,
    )


def _here(stages: Sequence[Stage], options: LocalOptions) -> Capacity | None:
    """What this machine has for the stages; None if it lacks what they ask for, which `run` refuses."""
    try:
        return capacity([stage.request for stage in stages], options)
    except ConfigError:
        return None


def _asks_for_gpus(options: LauncherOptions) -> bool:
    return isinstance(options, SlurmOptions) and bool(options.resources("train").gpus_per_node)


def _named(plan: Plan, device: str) -> str | None:
    """execution.device_model of the variants, checked."""
    said = {variant.run.execution.device_model for variant in plan.variants} - {None}
    if not said:
        return None
    names = sorted(map(str, said))
    problems = [
        f"execution.device_model = {name!r}: no such device. There are: {', '.join(devices.DEVICES)}."
        for name in names
        if devices.named(name) is None
    ]
    if len(names) > 1:
        problems.append(f"execution.device_model: the variants name {' and '.join(names)}. A plan is made for one device.")
    if device == "cpu":
        problems.append(f"execution.device_model = {names[0]!r} and execution.device = 'cpu' contradict each other. Set one to null or auto.")
    if problems:
        raise ConfigError(problems)
    return names[0]


def _of_table(name: str) -> tuple[str, int]:
    key = devices.named(name)
    assert key is not None, "checked"
    return key, int(devices.DEVICES[key].memory)


def _this_machine(device: str) -> tuple[str | None, int | None, int | None]:
    """(model, memory, available) of the devices here; of GPUs of several models the smallest memory and no model."""
    if device == "cpu":
        ram = machine.memory()
        return cpu_model(), *((None, None) if ram is None else (ram.total, ram.available))
    found = machine.gpu_models()
    if not found:
        return None, None, None
    smallest = min(gpu.memory for gpu in found)
    return found[0].name if len({gpu.name for gpu in found}) == 1 else None, smallest, smallest
