"""Which part of a model takes how long, in passes as training makes them: a mark wherever another part takes over.

Marks are set by hooks: before and after each layer in the forward pass, and in the backward pass where the gradient of a
layer's output is there, so that the layer's own backward pass begins, and the one's after it has ended. On a GPU a mark is an
event in its queue and nothing waits. The branches of a parallel layer are one part: their backward passes mix.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zexp.blocks import pattern
from zexp.model.language_model import LanguageModel

EMBEDDING, FINAL_NORM, HEAD, BETWEEN = "embedding", "final norm", "head and loss", "between"
FORWARD, BACKWARD = "forward", "backward"


class Spell(NamedTuple):
    """What was at work: a part and the pass that it was in. A layer's part is its branches' letters, joined by |."""

    part: str
    way: str


class Marks:
    """Marks of one model while `watching`; `mark` adds one by hand."""

    def __init__(self, model: LanguageModel, device: str):
        self._model, self._device = model, device
        self._marks: list[tuple[Any, Spell]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the model's parts."""
        model = self._model
        hooks = [*self._around(model.embedding, EMBEDDING, after=EMBEDDING), *self._around(model.norm, FINAL_NORM, after=HEAD)]
        for layer in model.layers:
            hooks += self._around(layer, part_of(layer))
        for letter, copies in model.shared.items():
            for copy in copies:  # type: ignore[attr-defined]
                hooks += self._around(copy, letter)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def mark(self, spell: Spell) -> None:
        """From here on it is at work."""
        if self._device == "cuda":
            stamp: Any = torch.cuda.Event(enable_timing=True)
            stamp.record()
        else:
            stamp = time.perf_counter()
        self._marks.append((stamp, spell))

    def taken(self) -> dict[Spell, float]:
        """Seconds of each since the last call, from the first mark to the last, whose spell ends nothing; then they are gone."""
        marks, self._marks = self._marks, []
        if self._device == "cuda":
            torch.cuda.synchronize()
        found: dict[Spell, float] = {}
        for (begin, spell), (end, _) in pairwise(marks):
            took = begin.elapsed_time(end) / 1e3 if self._device == "cuda" else end - begin
            found[spell] = found.get(spell, 0.0) + took
        return found

    def _around(self, module: nn.Module, part: str, after: str = BETWEEN) -> list[Any]:
        def before(*_: Any) -> None:
            self.mark(Spell(part, FORWARD))

        def behind(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
            self.mark(Spell(after, FORWARD))
            if out.requires_grad:
                out.register_hook(back)

        def back(_gradient: Tensor) -> None:
            self.mark(Spell(part, BACKWARD))

        return [module.register_forward_pre_hook(before), module.register_forward_hook(behind)]


def part_of(layer: nn.Module) -> str:
    """The part that a layer of a model is."""
    branches: Any = layer.branches
    return "|".join(branches)


def counts(layers: list[str]) -> Counter[str]:
    """How often each part of a pattern's layers stands in it; a shared block as often as it is called."""
    found = Counter("|".join(pattern.branches(layer)) for layer in layers)
    found.update(feeder for layer in layers if (feeder := pattern.feeder(layer)) is not None)
    return found


def mean(laps: list[Mapping[Spell, float]]) -> dict[Spell, float]:
    """Each spell's mean over the laps."""
    spells = dict.fromkeys(spell for lap in laps for spell in lap)
    return {spell: sum(lap.get(spell, 0.0) for lap in laps) / len(laps) for spell in spells}


def lapped(marks: Marks, work: Callable[[], object], laps: list[Mapping[Spell, float]]) -> Callable[[], None]:
    """The work with a mark at its beginning and its end, whose spells are added to `laps`."""

    def run() -> None:
        with marks.watching():
            marks.mark(Spell(BETWEEN, FORWARD))
            work()
            marks.mark(Spell(BETWEEN, FORWARD))
        laps.append(marks.taken())

    return run
