"""What earlier stages of a store took: tokens per second of a training, seconds of an evaluation, seconds of work on data.

Only what is like the planned stage counts: the same model, sequence length, precision, micro-batch, threads, kernels and
device. Where the catalogue has many, the youngest NEWEST are read, and a plan opens at most READ_AT_MOST files.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zexp.calc import devices
from zexp.store import files
from zexp.store.attempt import AttemptRecord
from zexp.store.errors import StoreError
from zexp.store.folder import StageFolder, Store
from zexp.study.catalogue import Catalogue

NEWEST = 8  # stages of one shape
ATTEMPTS = 3  # of one stage
READ_AT_MOST = 2000
TAIL_BYTES = 16_384  # of metrics.jsonl: about 90 lines
REQUEST_KEYS = ("micro_batch", "threads", "kernels", "deterministic")  # execution keys that make a training's speed


@dataclass(frozen=True)
class Shape:
    """What the speed of a training depends on. model: of text; request: the values of REQUEST_KEYS, whether activations are
    computed again, and how many ranks on how many nodes."""

    model: str
    seq_len: int
    precision: str
    document_mask: bool
    request: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """A measured value, from how many attempts or results, and the folder of the youngest."""

    value: float
    count: int
    folder: str


def _asked(request: Mapping[str, Any]) -> tuple[str, ...]:
    ranks = request.get("ranks", {})
    again = str(request.get("activation_checkpointing") == "full")  # auto: a device of this kind always chooses the same
    return (*(str(request.get(key)) for key in REQUEST_KEYS), again, *(str(ranks.get(key, 1)) for key in ("data", "nodes")))


@dataclass
class Measured:
    """Looks things up in a store. device: the model's name that speeds must be of; None = of any device."""

    catalogue: Catalogue
    device: str | None
    _trainings: dict[tuple[Any, ...], list[str]] | None = None
    _evals: dict[tuple[str, ...], list[str]] | None = None
    _memo: dict[Any, Figure | None] = field(default_factory=dict)
    _texts: dict[int, tuple[Any, str]] = field(default_factory=dict)  # by the block's identity: variants share them
    _reads: int = 0

    @property
    def store(self) -> Store:
        return self.catalogue.store

    def tokens_per_second(self, root: Mapping[str, Any], request: Mapping[str, Any]) -> Figure | None:
        """The median over the attempts of a training's shape of each one's second half.

        root: the semantic block of the first segment of its chain.
        """
        shape = Shape(self._text(root["model"]), root["seq_len"], root["precision"], root["document_mask"], _asked(request))
        return self._once(shape, lambda: self._speed(shape))

    def eval_seconds(self, eval: Mapping[str, Any], model: Mapping[str, Any], threads: int) -> Figure | None:
        """The median of what the same task took on states of the same model. eval: the evaluation's semantic block."""
        key = (self._text(eval["task"]), self._text(eval["settings"]), self._text(model))
        return self._once((key, threads), lambda: self._eval(key, threads))

    def units_per_second(self, kind: str) -> Figure | None:
        """Of a kind of data stage: bytes of a tokenizer and a corpus, sequences of a packing, stages of tasks."""
        return self._once(kind, lambda: self._data(kind))

    def _once(self, key: Any, find: Callable[[], Figure | None]) -> Figure | None:
        if key not in self._memo:
            self._memo[key] = find()
        return self._memo[key]

    def _text(self, block: Any) -> str:
        if id(block) not in self._texts:
            self._texts[id(block)] = (block, json.dumps(block, sort_keys=True))
        return self._texts[id(block)][1]

    # Training

    def _speed(self, shape: Shape) -> Figure | None:
        if self._trainings is None:
            self._trainings = {}
            for name, known in _youngest_first(self.catalogue.of("trajectory")):
                root = self.catalogue.root(known.id)
                if root is not None:
                    own = (self._text(root["model"]), root["seq_len"], root["precision"], root["document_mask"])
                    self._trainings.setdefault(own, []).append(name)
        names = self._trainings.get((shape.model, shape.seq_len, shape.precision, shape.document_mask), [])
        speeds: list[tuple[float, str]] = []
        for name in names:
            if len(speeds) >= NEWEST or self._reads >= READ_AT_MOST:
                break
            folder = self._folder("trajectory", name)
            speeds += [(speed, str(folder)) for speed in self._speeds_of(folder, shape)]
        return _median(speeds)

    def _speeds_of(self, folder: StageFolder, shape: Shape) -> Iterator[float]:
        """One speed for each of the last attempts that trained this shape on this device."""
        devices_of = self._intervals(folder)
        for attempt in reversed(folder.attempts()[-ATTEMPTS:]):
            self._reads += 2
            try:
                if _asked(attempt.request()) != shape.request:
                    continue
                lines = _last_lines(attempt.path / "metrics.jsonl")
            except (OSError, StoreError):
                continue  # it has not come so far
            # The first lines are of steps in which everything happens for the first time.
            lines = lines[len(lines) // 2 :]
            speeds = [
                float(line["tokens_per_second"])
                for line in lines
                if line.get("tokens_per_second") and self._is_here(devices_of, line["tokens"])
            ]
            if speeds:
                yield statistics.median(speeds)

    def _intervals(self, folder: StageFolder) -> list[tuple[int, str]]:
        """(up to which tokens, on which device) the newest state was trained, ascending."""
        there = folder.states()
        if not there:
            return []
        self._reads += 1
        state = files.read_json(folder.path / "states" / str(there[-1]) / "state.json")
        details = state["fingerprint_details"]
        return [(one["to"], details[one["fingerprint"]]["device"]) for one in state["fingerprints"]]

    def _is_here(self, intervals: list[tuple[int, str]], tokens: int) -> bool:
        """Whether the step that ended at `tokens` ran on the device that is asked for; no state says so of newer steps."""
        device = next((device for to, device in intervals if tokens <= to), None)
        return device is not None and self._is_asked_for(device)

    def _is_asked_for(self, device: str) -> bool:
        return self.device is None or device == self.device or devices.named(device) == self.device

    # Evaluation

    def _eval(self, key: tuple[str, ...], threads: int) -> Figure | None:
        if self._evals is None:
            self._evals = {}
            for name, known in _youngest_first(self.catalogue.of("eval")):
                root = self.catalogue.root(known.semantic["state"]["id"])
                if root is not None:
                    said = known.semantic
                    own = (self._text(said["task"]), self._text(said["settings"]), self._text(root["model"]))
                    self._evals.setdefault(own, []).append(name)
        seconds: list[tuple[float, str]] = []
        for name in self._evals.get(key, []):
            if len(seconds) >= NEWEST or self._reads >= READ_AT_MOST:
                break
            folder = self._folder("eval", name)
            self._reads += 1
            if folder.result is None:
                continue
            facts = files.read_json(folder.result / "results.json")
            if "device" in facts and self._is_asked_for(facts["device"]) and facts["threads"] == threads:
                seconds.append((facts["seconds"], str(folder)))
        return _median(seconds)

    # Data

    def _data(self, kind: str) -> Figure | None:
        speeds: list[tuple[float, str]] = []
        for name, _ in _youngest_first(self.catalogue.of(kind)):
            if len(speeds) >= NEWEST or self._reads >= READ_AT_MOST:
                break
            folder = self._folder(kind, name)
            attempt = folder.last_attempt()
            self._reads += 1
            if folder.result is not None and attempt is not None and (speed := _work_per_second(kind, attempt)) is not None:
                speeds.append((speed, str(folder)))
        return _median(speeds)

    def _folder(self, kind: str, name: str) -> StageFolder:
        return self.store.folder(kind, self.catalogue.of(kind)[name].id)


def _youngest_first(known: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(known.items(), key=lambda item: -item[1].made)


def _median(found: list[tuple[float, str]]) -> Figure | None:
    return Figure(statistics.median(value for value, _ in found), len(found), found[0][1]) if found else None


def _work_per_second(kind: str, attempt: AttemptRecord) -> float | None:
    """From the attempt's beginning to its last word. None if it said nothing, or other clocks make nonsense of it."""
    progress = attempt.progress()
    if progress is None:
        return None
    seconds = progress["time"] - os.stat(attempt.path / "request.yaml").st_mtime
    work = 1.0 if kind == "tasks" else progress["done"]
    return work / seconds if seconds > 0 and work > 0 else None


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines in the last TAIL_BYTES of a metrics.jsonl."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        raw = file.read()
    if size > TAIL_BYTES:
        raw = raw.partition(b"\n")[2]
    whole, _, _ = raw.rpartition(b"\n")
    return [json.loads(line) for line in whole.splitlines()]
