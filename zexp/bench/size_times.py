"""Candidates of one number of parameters, run forward and backward in turns. B sequences · T labels each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from zexp.bench import machine, marks
from zexp.bench.candidates import BASE, COMBINED, HEADS, MLP, VOCABULARY, WIDTH, Candidate, alignment, combined
from zexp.bench.marks import Marks, Spell, lapped
from zexp.bench.progress import progress
from zexp.bench.setting import device_of, setting
from zexp.bench.size import Question
from zexp.bench.step_times import DOCUMENT_TOKENS, MATMULS
from zexp.bench.timing import in_turns, median_interval
from zexp.blocks.resolve import specs_of
from zexp.calc import model as calc
from zexp.model.build import build
from zexp.train.batches import Batch
from zexp.train.step import backward

LEAST_ROUNDS = 6  # fewer have no interval of 95 %
WHOLE_ROUNDS = 6
NOTABLE = 0.05  # a part's FLOP/s that differ by less from the base's are not spoken of


def measure(question: Question, seconds: float) -> dict[str, Any]:
    """What `zexp bench size --json` prints."""
    device = device_of(question.place["device"])
    run = question.run
    with (
        progress("sizes", len(question.candidates) + 3) as say,
        setting(question.place["threads"], deterministic=run.execution.deterministic),
    ):
        say("the machine's ceilings")
        ceilings = machine.ceilings(device)
        batch = random_batch(question, device)
        runs = []
        for one in question.candidates:
            say(f"building {one.name}")
            runs.append(Sample(one, reduced(one.model), question, batch, device))
        say(f"all in turns, {LEAST_ROUNDS} rounds at least")
        works = {str(number): sample.work for number, sample in enumerate(runs)}
        in_turns(works, device, seconds=0.7 * seconds, least=LEAST_ROUNDS, most=50)
        base, rows = runs[0], [_row(sample, runs[0], ceilings[MATMULS[run.precision]]) for sample in runs]
        winner = _winner(question, runs, rows)
        for sample in runs:
            sample.drop()
        whole, missing = None, []
        if winner is not None:
            expected = 2 * (1 + WHOLE_ROUNDS) * question.tokens / rows[0]["tokens_per_second"]
            if expected <= seconds:
                say(f"whole: {winner.name} beside the base")
                whole = _whole(question, base.candidate, winner, batch, device)
            else:
                missing.append(f"the whole model of {winner.name}: some {expected:.0f} s, more than --seconds {seconds:g}.")
        else:
            missing.append("a whole model beside the base: no candidate is faster for certain.")
        about = machine.facts(device)
    return {
        "name": question.name, "machine": about, "ceilings": ceilings,
        "parameters": question.parameters, "tolerance": question.tolerance, "micro_batch": run.execution.micro_batch,
        "seq_len": run.seq_len, "precision": run.precision, "kernels": run.kernels.backend,
        "rounds": len(base.laps) - 1, "candidates": rows, "facts": facts(rows), "whole": whole, "not_measured": missing,
    }  # fmt: skip


def reduced(model: Mapping[str, Any]) -> dict[str, Any]:
    """The same with each distinct layer once; twice where the first of a letter lacks weights that later ones have."""
    specs = specs_of(model)
    most = {
        layer: 1 + any(specs[letter].missing_in_first(model["width"]) > 0 for letter in layer if letter.isalpha())
        for layer in model["pattern"]
    }
    kept: list[str] = []
    for layer in model["pattern"]:
        if kept.count(layer) < most[layer]:
            kept.append(layer)
    return {**model, "pattern": kept}


def random_batch(question: Question, device: str) -> Batch:
    """Ids that every candidate has, one micro-batch of them."""
    generator = torch.Generator().manual_seed(0)
    shape = (question.run.execution.micro_batch, question.run.seq_len)
    tokens_BT = torch.randint(question.vocab_size, (shape[0], shape[1] + 1), generator=generator)
    begins = torch.rand(shape, generator=generator) < 1 / DOCUMENT_TOKENS
    documents_BT = begins.cumsum(dim=1).to(torch.int32)
    return Batch(tokens_BT[:, :-1].contiguous().to(device), tokens_BT[:, 1:].contiguous().to(device), documents_BT.to(device))


class Sample:
    """A candidate's model, whole or reduced, and what its passes took: a lap a round, the first one not counted."""

    def __init__(self, candidate: Candidate, model: dict[str, Any], question: Question, batch: Batch, device: str):
        self.candidate, self.question = candidate, question
        self.counts, self.built = marks.counts(candidate.model["pattern"]), marks.counts(model["pattern"])
        built = build(model, seed=0, kernels=question.run.kernels.backend, device=device).train()
        self.laps: list[Mapping[Spell, float]] = []
        run = question.run

        def passes() -> None:
            backward(
                built,
                batch,
                micro_batch=run.execution.micro_batch,
                precision=run.precision,
                document_mask=question.document_mask,
            )
            built.zero_grad(set_to_none=True)  # while the others have their turns

        self.work: Callable[[], None] = lapped(Marks(built, device), passes, self.laps)

    def drop(self) -> None:
        """Let the model go."""
        self.work = _gone

    def seconds(self, lap: Mapping[Spell, float]) -> float:
        """Of the whole model's passes over a micro-batch, in one round."""
        return sum(took * self._times(spell.part) for spell, took in lap.items())

    def rounds(self) -> list[float]:
        return [self.seconds(lap) for lap in self.laps[1:]]

    def parts(self) -> dict[str, float]:
        """FLOP/s of each part that has FLOPs, of its median time."""
        model, tokens = self.candidate.model, self.question.tokens
        table = {row.letter or row.name: row.flops / row.count for row in calc.block_table(model, self.question.run.seq_len)}
        found = {}
        for part, count in [*self.built.items(), (marks.HEAD, 1)]:
            took = statistics.median(
                sum(seconds for spell, seconds in lap.items() if spell.part == part) for lap in self.laps[1:]
            )
            flops = sum(table[letter] for letter in part.split("|")) if part in self.built else table["head"]
            found[part] = calc.TRAIN_PER_FORWARD * tokens * count * flops / took
        return found

    def _times(self, part: str) -> float:
        return self.counts[part] / self.built[part] if part in self.built else 1.0


def _gone() -> None:
    raise RuntimeError("the model of this sample was let go")


def _ratio(base: Sequence[float], own: Sequence[float]) -> dict[str, float]:
    """Speed over the base's, round by round: the median with its 95 % interval."""
    ratios = [one / other for one, other in zip(base, own, strict=True)]
    low, high = median_interval(ratios)
    return {"median": statistics.median(ratios), "low": low, "high": high}


def _verdict(ratio: Mapping[str, float]) -> str:
    return "faster" if ratio["low"] > 1 else "slower" if ratio["high"] < 1 else "cannot distinguish"


def _row(sample: Sample, base: Sample, ceiling: float) -> dict[str, Any]:
    question = sample.question
    seconds = statistics.median(sample.rounds())
    rate = question.tokens / seconds
    flops = calc.flops_per_token(sample.candidate.model, question.run.seq_len)["train"]
    over = _ratio(base.rounds(), sample.rounds())
    own, theirs = sample.parts(), base.parts()
    return {
        **sample.candidate.to_json(), "seconds": seconds, "tokens_per_second": rate, "flops_per_token": flops,
        "flops_per_second": rate * flops, "share_of_matmul": rate * flops / ceiling, "over_base": over,
        "verdict": BASE if sample is base else _verdict(over),
        "parts": {
            _label(sample, part): {"flops_per_second": value, "over_base": value / theirs[part]} for part, value in own.items()
        },
    }  # fmt: skip


def _label(sample: Sample, part: str) -> str:
    names = {letter: spec.NAME for letter, spec in specs_of(sample.candidate.model).items()}
    return " | ".join(names[letter] for letter in part.split("|")) if part in sample.counts else part


def _winner(question: Question, runs: Sequence[Sample], rows: Sequence[Mapping[str, Any]]) -> Candidate | None:
    """The fastest of each kind of change together, where they can be and stay near the target; else the fastest candidate."""
    faster = sorted(
        (number for number, row in enumerate(rows) if row["verdict"] == "faster"),
        key=lambda number: -float(rows[number]["tokens_per_second"]),
    )
    if not faster:
        return None
    best: dict[str, Candidate] = {}
    for number in faster:
        best.setdefault(runs[number].candidate.factor, runs[number].candidate)
    fastest = runs[faster[0]].candidate
    # A width comes with MLPs and heads of its own, so only the embedding's rows go with it.
    together = (WIDTH, VOCABULARY) if fastest.factor == WIDTH else (MLP, HEADS, VOCABULARY)
    chosen = [best[factor] for factor in together if factor in best]
    both = combined(runs[0].candidate, chosen, question.vocab_size)
    near = both is not None and abs(both.parameters / question.parameters - 1) <= question.tolerance
    return both if near else fastest


def _whole(question: Question, base: Candidate, winner: Candidate, batch: Batch, device: str) -> dict[str, Any]:
    """Both models as they are, in turns."""
    samples = {name: Sample(one, one.model, question, batch, device) for name, one in ((BASE, base), ("winner", winner))}
    in_turns(
        {name: sample.work for name, sample in samples.items()}, device, seconds=0.0, least=WHOLE_ROUNDS, most=WHOLE_ROUNDS
    )
    rounds = {name: sample.rounds() for name, sample in samples.items()}
    over = _ratio(rounds[BASE], rounds["winner"])
    rates = {name: question.tokens / statistics.median(took) for name, took in rounds.items()}
    return {
        **winner.to_json(), "tokens_per_second": rates["winner"], "base_tokens_per_second": rates[BASE], "over_base": over,
        "verdict": _verdict(over), "rounds": WHOLE_ROUNDS, "combined": winner.factor == COMBINED,
    }  # fmt: skip


def facts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the figures say of multiples, heads and rows: of this device, these sizes and this run."""
    base = rows[0]
    found = []
    widths = [base, *(row for row in rows if row["factor"] == WIDTH)]
    if any(row["verdict"] in ("faster", "slower") for row in widths):  # else the figures' order is noise
        by_multiple: dict[int, list[float]] = {}
        for row in widths:
            by_multiple.setdefault(alignment(row["width"]), []).append(row["flops_per_second"])
        said = ", ".join(
            f"{step}: {statistics.median(rates) / 1e9:,.4g} GFLOP/s ({len(rates)})"
            for step, rates in sorted(by_multiple.items())
        )
        found.append(f"Widths by the largest power of two that divides them: {said}.")
    for factor, what in ((WIDTH, "widths"), (MLP, "MLP widths"), (HEADS, "heads"), (VOCABULARY, "rows of the embedding")):
        those = [row for row in rows if row["factor"] == factor]
        if not those:
            continue
        counted = {
            verdict: sum(row["verdict"] == verdict for row in those) for verdict in ("faster", "slower", "cannot distinguish")
        }
        found.append(
            f"Of {len(those)} other {what}, {counted['faster']} faster than the base, {counted['slower']} slower, "
            f"{counted['cannot distinguish']} not to be distinguished from it."
        )
        for row in those:
            parts = [
                f"{part} {one['over_base']:.2f} times"
                for part, one in row["parts"].items()
                if abs(one["over_base"] - 1) > NOTABLE
            ]
            if parts and row["verdict"] != "cannot distinguish":
                found.append(f"{row['name']} is {row['verdict']}; FLOP/s over the base's: {', '.join(parts)}.")
    return found
