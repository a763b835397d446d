"""Phases, as a user writes them, to segments, as they are trained and identified (design: a tree of trajectories).

A phase is cut where its learning rate starts to depend on the horizon: WSD gives an open trunk and a decay, a
constant rate one open segment, a cosine one segment that carries its horizon. A segment that only goes on with its
parent (same stream, batch and rate) is merged into it, so that a longer run extends a shorter one. Everything here is
a function of its arguments; ids hash what the trainer reads, in absolute tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from zexp.config.errors import ConfigError, Problems
from zexp.config.identity import semantic_dict
from zexp.config.schema import Anneal, Mix, MixSource, Phase, Run, Schedule
from zexp.config.tokens import parse_length, parse_tokens, round_up
from zexp.data import mix as data_mix
from zexp.data import stream as data_stream
from zexp.store.ids import round12, semantic_id
from zexp.train import legality
from zexp.train import schedule as lr_schedule

PARTS = data_mix.PARTS  # of the mixing table: weights are whole numbers of 1/4096

# Raised when the update rule changes; the implementation (fused, foreach) is part of the numerics fingerprint.
OPTIMIZER_NUMERICS = {"adamw": 1}


@dataclass(frozen=True)
class Segment:
    """One canonical stretch of training.

    start, to: absolute tokens, multiples of a step. `to` is the target of this variant: for an open segment it is
    not part of the identity. phase: the name of the phase that ends in it.
    """

    id: str
    semantic: dict[str, Any]
    start: int
    to: int
    phase: str
    is_open: bool


@dataclass(frozen=True)
class PhaseSpan:
    """What became of one phase: its tokens after rounding to steps, and the index of its last segment."""

    name: str
    start: int
    to: int
    batch_tokens: int
    last_segment: int
    schedule: str
    peak_lr: float
    replay_fraction: float


@dataclass(frozen=True)
class Chain:
    """A variant's trajectory: segments from the root to the end, and the phases that they came from."""

    segments: list[Segment]
    phases: list[PhaseSpan]

    @property
    def tokens(self) -> int:
        return self.segments[-1].to


@dataclass(frozen=True)
class _Step:
    """A phase in the order of training, with a key for messages."""

    name: str
    key: str
    parent: str | None
    config: Phase | Anneal


def compile_chain(
    run: Run,
    *,
    model: Mapping[str, Any],
    model_numerics: Mapping[str, int],
    tokenizer: str,
    packing: Callable[[str, MixSource], str],
    init: Mapping[str, Any] | None = None,
) -> Chain:
    """The chain of segments that a run trains.

    model: the resolved model with its defaults; tokenizer: its id; packing(name, source): the packing's id.
    init: {from_hf, numerics} of weights that are given (zexp.model.hf.folder.init_semantic); None = drawn from a seed.
    Raises ConfigError with every mistake of phases, schedules, mixes and the anneal.
    """
    problems = Problems()
    legality.check_run(run, tuple(OPTIMIZER_NUMERICS), problems)
    steps = _ordered(run, problems)
    for step in steps:
        legality.check_phase(step.config, step.key, run, problems)
    problems.raise_if_any()
    segments: list[Segment] = []
    spans: list[PhaseSpan] = []
    batch: int | None = None
    for step in steps:
        try:
            batch = _batch_tokens(step, batch)
            parent = segments[-1] if segments else None
            peak_of_parent = spans[-1].peak_lr if spans else None
            pieces, cut, length, label, peak = _learning_rate(step, run, parent, batch, peak_of_parent)
            streams = _streams(step, run, segments, packing)
            _append(segments, run, step, pieces, cut, length, batch, streams, model, model_numerics, tokenizer, init)
        except ConfigError as error:
            problems.extend(error.problems)
            break  # what follows depends on this phase's length
        replay = step.config.replay.fraction if isinstance(step.config, Anneal) else 0.0
        start = spans[-1].to if spans else 0
        spans.append(PhaseSpan(step.name, start, start + length, batch, len(segments) - 1, label, peak, replay))
    problems.raise_if_any()
    return Chain(segments, spans)


def _order(run: Run) -> list[_Step]:
    problems = Problems()
    if "anneal" in run.phases:
        problems.add("phases.anneal cannot be set: `anneal` is a group of its own (anneal=replay60).")
    steps = _written(run)
    names = {step.name for step in steps}
    for step in steps:
        if step.parent is not None and step.parent not in names:
            problems.add(
                f"{step.key}.parent = {step.parent!r} names no phase. "
                f"The phases are: {', '.join(sorted(names - {step.name})) or 'none'}."
            )
    problems.raise_if_any()
    roots = [step for step in steps if step.parent is None]
    if len(roots) != 1:
        found = ", ".join(step.key for step in roots) or "none"
        raise ConfigError(f"phases: exactly one phase starts from initial weights (parent: null); found {found}.")
    chain = [roots[0]]
    while True:
        children = [step for step in steps if step.parent == chain[-1].name]
        if len(children) > 1:
            raise ConfigError(
                f"phases: {' and '.join(step.key for step in children)} both continue {chain[-1].name!r}. "
                "One variant is one chain; write the branches as arms of a study, or set `parent` so that they follow each other."
            )
        if not children:
            break
        chain.append(children[0])
    if len(chain) != len(steps):
        lost = sorted(step.key for step in steps if step not in chain)
        raise ConfigError(f"phases: {', '.join(lost)} cannot be reached from {chain[0].name!r}: `parent` runs in a circle.")
    return chain


def _written(run: Run) -> list[_Step]:
    steps = [_Step(name, f"phases.{name}", phase.parent, phase) for name, phase in run.phases.items()]
    if run.anneal is not None:
        steps.append(_Step("anneal", "anneal", run.anneal.parent, run.anneal))
    return steps


def _ordered(run: Run, problems: Problems) -> list[_Step]:
    """The phases in the order of training; in the order of their keys where they are no chain, which is a problem."""
    try:
        return _order(run)
    except ConfigError as error:
        problems.extend(error.problems)
        return _written(run)


def _batch_tokens(step: _Step, parent_batch: int | None) -> int:
    if step.config.batch_tokens is not None:
        return parse_tokens(step.config.batch_tokens, f"{step.key}.batch_tokens")
    assert parent_batch is not None, "the root sets it"
    return parent_batch


Pieces = list[dict[str, Any]]


def _learning_rate(
    step: _Step, run: Run, parent: Segment | None, batch: int, parent_peak: float | None
) -> tuple[Pieces, int | None, int, str, float]:
    """(pieces, tokens at which the horizon starts to matter or None, length, label, peak) of a phase, absolute tokens."""
    start = parent.to if parent else 0
    length = parse_length(step.config.tokens, start if parent else None, f"{step.key}.tokens")
    length = round_up(length, batch)
    if isinstance(step.config, Anneal):
        assert parent_peak is not None
        return *_anneal_rate(step.config, start, length, batch, parent_peak), step.config.shape, parent_peak
    schedule = step.config.schedule or run.schedule
    key = f"{step.key}.schedule" if step.config.schedule else "schedule"
    pieces, cut = _phase_rate(schedule, key, start, length, batch)
    return pieces, cut, length, schedule.kind, schedule.peak_lr


def _anneal_rate(anneal: Anneal, start: int, length: int, batch: int, peak_lr: float) -> tuple[Pieces, int | None, int]:
    warmup = round_up(parse_tokens(anneal.warmup_tokens, "anneal.warmup_tokens"), batch)
    if warmup >= length:
        raise ConfigError(
            f"anneal.warmup_tokens = {anneal.warmup_tokens} ({warmup} in whole steps) leaves nothing of the anneal's "
            f"{length} tokens to decay in. Shorten it or lengthen anneal.tokens."
        )
    top, floor = round12(peak_lr * anneal.peak_fraction), round12(peak_lr * anneal.floor_fraction)
    pieces = _warmup(start, warmup, top)
    pieces, cut = _tail(pieces, start, start + warmup, start + length, anneal.shape, top, floor)
    return pieces, cut, length


def _phase_rate(schedule: Schedule, key: str, start: int, length: int, batch: int) -> tuple[Pieces, int | None]:
    warmup = round_up(parse_tokens(schedule.warmup_tokens, f"{key}.warmup_tokens"), batch)
    decay = round_up(parse_length(schedule.decay, length, f"{key}.decay"), batch) if schedule.decay is not None else 0
    if warmup + decay > length or (warmup == length and schedule.kind != "constant"):
        raise ConfigError(
            f"{key}: the warm-up ({warmup} tokens in whole steps){f' and the decay ({decay})' if decay else ''} "
            f"do not fit into the phase's {length} tokens. Shorten them or lengthen the phase."
        )
    peak = round12(float(schedule.peak_lr))
    floor = round12(peak * (schedule.floor_fraction or 0.0))
    end = start + length
    pieces = _warmup(start, warmup, peak)
    if schedule.kind == "wsd":
        assert schedule.decay_shape is not None
        if warmup + decay == length and warmup == 0:  # no trunk: the decay is the phase
            return [{"from": start, "to": end, "shape": schedule.decay_shape, "start": peak, "end": floor}], start
        # The trunk is open also where this run decays as soon as it is warm: a longer run goes on from there.
        pieces.append({"from": start + warmup, "to": None, "shape": "constant", "start": peak, "end": peak})
        pieces.append({"from": end - decay, "to": end, "shape": schedule.decay_shape, "start": peak, "end": floor})
        return pieces, end - decay
    shape = schedule.kind
    return _tail(pieces, start, start + warmup, end, shape, peak, floor)


def _warmup(start: int, warmup: int, top: float) -> Pieces:
    if warmup == 0:
        return []
    return [{"from": start, "to": start + warmup, "shape": "linear", "start": 0.0, "end": top}]


def _tail(
    pieces: Pieces, start: int, since: int, end: int, shape: str, top: float, floor: float
) -> tuple[Pieces, int | None]:
    """After the warm-up: an open constant (no horizon), or a shape that has the whole phase depend on its end."""
    if shape == "constant":
        return [*pieces, {"from": since, "to": None, "shape": "constant", "start": top, "end": top}], None
    return [*pieces, {"from": since, "to": end, "shape": shape, "start": top, "end": floor}], start


def _streams(
    step: _Step, run: Run, segments: list[Segment], packing: Callable[[str, MixSource], str]
) -> list[dict[str, Any]]:
    """The streams of a phase; a mix that equals its parent's is the parent's stream, continued."""
    config = step.config
    parent = segments[-1] if segments else None
    mix: Mix = config.mix or run.mix
    replay = config.replay if isinstance(config, Anneal) else None
    shares: list[float] = []
    names: list[str] = []
    entries: list[dict[str, Any]] = []
    if replay is not None and replay.fraction > 0:
        assert parent is not None
        entries.append({"replay": parent.id, "start": replay.start})
        shares.append(replay.fraction)
        names.append(f"{step.key}.replay.fraction")
    rest = 1.0 - (replay.fraction if replay is not None else 0.0)
    if rest > 0:
        weights = {name: float(source.weight) for name, source in mix.sources.items() if source.weight > 0}
        seeds = _introduced(segments)
        own_seed = config.seed if config.seed is not None else run.seed
        for name, weight in weights.items():
            packed = packing(name, mix.sources[name])
            entries.append({"packing": packed, "seed": seeds.get(packed, own_seed)})
            shares.append(rest * weight / sum(weights.values()))
            names.append(f"{step.key}.mix.sources.{name}.weight" if config.mix else f"mix.sources.{name}.weight")
    for entry, part in zip(entries, data_mix.quantise(shares, names), strict=True):
        entry["weight"] = part
    if parent is not None:
        whole = [{"replay": parent.id, "start": "continue", "weight": PARTS}]
        if entries == _origin_streams(segments):
            return whole
    return entries


def _introduced(segments: list[Segment]) -> dict[str, int]:
    """Packing id -> the seed that it was introduced with, over the ancestors."""
    seeds: dict[str, int] = {}
    for segment in segments:
        for entry in segment.semantic["streams"]:
            if "packing" in entry:
                seeds.setdefault(entry["packing"], entry["seed"])
    return seeds


def _origin_streams(segments: list[Segment]) -> list[dict[str, Any]]:
    """The streams of the segment in which the last one's stream began (a pure continuation has none of its own)."""
    for segment in reversed(segments):
        streams: list[dict[str, Any]] = segment.semantic["streams"]
        if not data_stream.is_continuation(streams):
            return streams
    raise AssertionError("the root segment introduces its sources")


def _append(
    segments: list[Segment],
    run: Run,
    step: _Step,
    pieces: Pieces,
    cut: int | None,
    length: int,
    batch: int,
    streams: list[dict[str, Any]],
    model: Mapping[str, Any],
    model_numerics: Mapping[str, int],
    tokenizer: str,
    init: Mapping[str, Any] | None,
) -> None:
    """Append a phase's segments: one, or two where the learning rate is cut, or none where it is the parent's continuation."""
    start = segments[-1].to if segments else 0
    end = start + length
    if cut is None or cut == start:
        parts = [(pieces, start, end)]
    else:
        decay = [piece for piece in pieces if piece["from"] >= cut and piece["to"] is not None]
        parts = [([piece for piece in pieces if piece not in decay], start, cut), (decay, cut, end)]
    for number, (part, begin, until) in enumerate(parts):
        if begin == until:
            continue
        if wrong := lr_schedule.check(part):
            raise ConfigError([f"{step.key}: the learning rate is no schedule: {text}" for text in wrong])
        parent = segments[-1] if segments else None
        state = step.config.optimizer_state if number == 0 else "carry"
        if parent is not None and number > 0:
            streams = [{"replay": parent.id, "start": "continue", "weight": PARTS}]
        if parent is not None and _continues(parent, part, batch, streams, state):
            segments[-1] = replace(parent, to=until, phase=step.name)
            continue
        semantic = _semantic(run, parent, part, begin, batch, streams, state, model, model_numerics, tokenizer, init)
        is_open = part[-1]["to"] is None
        segments.append(Segment(semantic_id(semantic), semantic, begin, until, step.name, is_open))


def _continues(parent: Segment, part: Pieces, batch: int, streams: list[dict[str, Any]], state: str) -> bool:
    """True if the segment is what its open parent would do anyway."""
    last = parent.semantic["lr"][-1]
    return (
        parent.is_open
        and state == "carry"
        and data_stream.is_continuation(streams)
        and parent.semantic["batch"][-1]["tokens"] == batch
        and len(part) == 1
        and part[0]["to"] is None
        and last["to"] is None
        and part[0]["start"] == last["end"]
    )


def _semantic(
    run: Run,
    parent: Segment | None,
    pieces: Pieces,
    start: int,
    batch: int,
    streams: list[dict[str, Any]],
    optimizer_state: str,
    model: Mapping[str, Any],
    model_numerics: Mapping[str, int],
    tokenizer: str,
    init: Mapping[str, Any] | None,
) -> dict[str, Any]:
    optim = semantic_dict(run.optim)
    optim["betas"] = [round12(float(beta)) for beta in run.optim.betas]
    for name in ("eps", "weight_decay", "clip"):
        optim[name] = round12(float(optim[name]))
    semantic: dict[str, Any] = {
        "parent": None if parent is None else {"id": parent.id, "tokens": start},
        "seq_len": run.seq_len,
        "precision": run.precision,
        "document_mask": run.corpus.packing.document_mask,
        "batch": [{"from": start, "tokens": batch}],
        "lr": pieces,
        "streams": streams,
        "optim": optim,
        "optimizer_state": optimizer_state,
        "numerics": {
            **lr_schedule.numerics(pieces),
            **data_stream.numerics(streams),
            f"optim.{run.optim.kind}": OPTIMIZER_NUMERICS[run.optim.kind],
        },
    }
    if parent is None:
        semantic |= {"model": dict(model), "tokenizer": tokenizer}
        semantic["numerics"] |= dict(model_numerics)
        if init is None:
            semantic["seeds"] = {"init": run.seeds.init if run.seeds.init is not None else run.seed}
        else:
            semantic["init"] = {"from_hf": dict(init["from_hf"])}
            semantic["numerics"] |= dict(init["numerics"])
    return semantic
