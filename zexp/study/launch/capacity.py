"""What the stages of a launch may use on this machine, and how much each of them needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from zexp.config.errors import ConfigError
from zexp.study import ranks
from zexp.study.launch import machine
from zexp.study.launch.base import Size
from zexp.study.launch.options import WHERE, LocalOptions
from zexp.study.launch.turn import Unit


@dataclass(frozen=True)
class Capacity:
    """Units of this machine. visible: what CUDA_VISIBLE_DEVICES calls a GPU; empty where stages run on CPU cores.

    gpus: GPUs (or shares) that a process of a stage takes; None = it takes as many cores as it has threads.
    """

    units: tuple[Unit, ...]
    visible: Mapping[Unit, str]
    gpus: int | None

    def need(self, size: Size) -> int:
        """Units of a stage. One with more threads than there are cores has all of them."""
        if self.gpus is not None:
            return self.gpus * size.ranks
        return min(size.threads * size.ranks, len(self.units))

    def slots(self, size: Size) -> int:
        """How many stages of one size run at once, on a machine that nobody else uses."""
        return len(self.units) // self.need(size)

    def devices(self, units: Iterable[Unit]) -> str:
        """CUDA_VISIBLE_DEVICES for a stage that has these units."""
        return ",".join(filter(None, (self.visible.get(unit, "") for unit in units)))


def capacity(requests: Iterable[Mapping[str, Any]], options: LocalOptions) -> Capacity:
    """For stages with these requests. Raises ConfigError if they ask for GPUs, or kernels for GPUs, that are not there.

    Stages whose request names no device (data) need none; one that says auto is content with cores, unless the options
    ask for several GPUs a stage.
    """
    requests = list(requests)
    asked = {str(request["device"]) for request in requests if "device" in request}
    several = options.gpus_per_stage > 1
    if asked and several and not asked & {"cuda", "auto"}:
        raise ConfigError(
            f"{WHERE}.gpus_per_stage = {options.gpus_per_stage}, but execution.device = cpu. "
            "execution.device=cuda trains on GPUs."
        )
    widest = max((ranks.count(request) for request in requests), default=1)
    found = machine.gpus() if asked & {"cuda", "auto"} else []
    if "cuda" in asked and not found:
        raise machine.no_gpu()
    if not found and any(request.get("kernels") == "fused" for request in requests):
        raise ConfigError(
            "kernels = fused: fused kernels run on a CUDA device, and this machine shows no GPU (nvidia-smi -L, "
            "CUDA_VISIBLE_DEVICES).\n  Use kernels=auto or kernels=torch here."
        )
    if asked and several and options.gpus_per_stage > len(found):
        raise ConfigError(
            f"{WHERE}.gpus_per_stage = {options.gpus_per_stage}, but this machine shows {_count(len(found))} "
            f"(nvidia-smi -L, CUDA_VISIBLE_DEVICES).\n  Ask for at most {max(1, len(found))}."
        )
    if widest > 1 and found and widest * options.gpus_per_stage > len(found):
        raise ConfigError(
            f"parallelism.data = {widest}: each rank has a GPU of its own, and this machine shows {len(found)}.\n"
            f"  Set parallelism.data to {len(found)} or less, or execution.device=cpu."
        )
    if not found:
        return Capacity(tuple(Unit(f"core-{number}") for number in machine.core_numbers()), {}, None)
    named = list(zip(machine.gpu_names(found), found, strict=True))
    shares = [None] if options.stages_per_gpu == 1 else list(range(options.stages_per_gpu))
    visible = {Unit(name, share): device for share in shares for name, device in named}  # spread over GPUs first
    return Capacity(tuple(visible), visible, options.gpus_per_stage)


def _count(gpus: int) -> str:
    return "no GPU" if gpus == 0 else f"{gpus} GPU{'s' * (gpus > 1)}"
