"""Whether the trainings of a plan fit their device: what cannot is refused before anything starts, what is close is warned of.

Of a device that is not known nothing is said. The figures are zexp.calc.memory's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from zexp.calc import memory
from zexp.config.errors import Problems
from zexp.study.plan import Plan
from zexp.study.queue import Queue
from zexp.study.resolve import Variant, layout_of
from zexp.study.show import say_bytes


@dataclass(frozen=True)
class Need:
    """What training an architecture takes on each device.

    name: the architecture's, or the variant's where several architectures have one name; variant: the first that is trained;
    room: bytes for one stage while as many run as there are slots, None = not known; on_gpu: whether they are a GPU's.
    """

    name: str
    variant: Variant
    training: memory.Training
    room: int | None
    on_gpu: bool = False

    def to_json(self) -> dict[str, Any]:
        run = self.variant.run
        return {
            "arch": self.name,
            "seq_len": run.seq_len,
            "micro_batch": run.execution.micro_batch,
            "precision": run.precision,
            **self.training.to_json(),
            "room": self.room,
            "fits": None if self.room is None else self.training.total <= memory.FULL * self.room,
        }


def needs(plan: Plan, queue: Queue) -> list[Need]:
    """One for each architecture that is trained, with its sequence length, micro-batch, precision and layout."""
    by_name = {variant.name: variant for variant in plan.variants}
    variants = {stage.variants[0]: None for stage in plan.to_do if stage.kind == "segment" and stage.to_train}
    at_once = 1 if queue.device == "cuda" else min(queue.slots or 1, len(variants))
    found: dict[tuple[Any, ...], Need] = {}
    for variant in (by_name[name] for name in variants):
        run = variant.run
        # The resolver gives variants of one architecture one dict.
        setting = run.parallelism.activation_checkpointing
        key = (id(variant.model), run.seq_len, run.execution.micro_batch, run.precision, layout_of(run), setting)
        if key not in found:
            room = None if queue.available is None else queue.available // at_once
            on_gpu = queue.device == "cuda"
            found[key] = Need(variant.arch, variant, _training(variant, {}, room if on_gpu else None), room, on_gpu)
    seen = Counter(need.name for need in found.values())
    return [replace(need, name=need.variant.name) if seen[need.name] > 1 else need for need in found.values()]


def check(found: list[Need], queue: Queue) -> None:
    """Raises ConfigError naming every architecture whose weights, gradients and optimizer alone exceed the device."""
    if queue.memory is None:
        return
    problems = Problems()
    for need in found:
        fixed = need.training.total - need.training.activations
        if fixed > queue.memory:
            total = need.variant.parameters["total"]
            problems.add(
                f"{need.name} ({total / 1e9:.3g} B parameters) cannot be trained here: weights, gradients and optimizer "
                f"alone take {say_bytes(fixed)}, and {_device(queue)} has {say_bytes(queue.memory)}.\n"
                "  Take a smaller arch or a larger device; `zexp calc` shows what each layout takes."
            )
    problems.raise_if_any()


def warnings(found: list[Need], queue: Queue) -> list[str]:
    """Of trainings that are likely to run out of memory: what they take, and what would help."""
    texts = []
    for need in found:
        if need.room is None or need.training.total <= memory.FULL * need.room:
            continue
        run = need.variant.run
        share = "has" if need.room == queue.available else f"has for each of {queue.slots} stages at once"
        text = (
            f"{need.name} may run out of memory: training takes about {say_bytes(need.training.total)} at "
            f"execution.micro_batch={run.execution.micro_batch}, and {_device(queue)} {share} {say_bytes(need.room)}."
        )
        texts.append(text + "".join(f" {advice}" for advice in _advice(need)))
    return texts


def line(found: list[Need], queue: Queue) -> str | None:
    """The largest need against its room, for people."""
    if not found:
        return None
    most = max(found, key=lambda need: need.training.total)
    text = f"Memory: at most {say_bytes(most.training.total)} a training ({most.name}"
    text += f", micro_batch {most.variant.run.execution.micro_batch})"
    return f"{text}, of {say_bytes(most.room)}." if most.room is not None else f"{text}."


def _device(queue: Queue) -> str:
    return "this machine" if queue.device == "cpu" else queue.model or "the GPU"


def _training(variant: Variant, changed: Mapping[str, Any], room: int | None = None) -> memory.Training:
    """changed: micro_batch or checkpointing other than the config's. room: of a GPU, what auto chooses by; None = it is none."""
    run = variant.run
    micro_batch = changed.get("micro_batch", run.execution.micro_batch)
    setting = changed.get("checkpointing", run.parallelism.activation_checkpointing)
    sizes = {"seq_len": run.seq_len, "micro_batch": micro_batch, "precision": run.precision}
    layout = layout_of(run)
    chosen = memory.checkpointing(setting, variant.model, layout, **sizes, room=room)
    return memory.training(variant.model, replace(layout, checkpointing=chosen), **sizes)


def _advice(need: Need) -> list[str]:
    """What takes less and may be set, with what it would take."""
    found = []
    run = need.variant.run
    half = run.execution.micro_batch // 2
    while half >= 1:
        taken = _training(need.variant, {"micro_batch": half}, need.room if need.on_gpu else None).total
        if (need.room is not None and taken <= memory.FULL * need.room) or half == 1:
            found.append(f"execution.micro_batch={half} would take {say_bytes(taken)}.")
            break
        half //= 2
    taken = _training(need.variant, {"checkpointing": "full"}).total
    if taken < need.training.total:
        found.append(f"parallelism.activation_checkpointing=full would take {say_bytes(taken)}.")
    return found
