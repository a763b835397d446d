"""A whole training step of a config: tokens/s, MFU with exact FLOPs, peak memory, and how long each kind of block takes.

The step is the training loop's: forward and backward in micro-batches, clipping, AdamW. Its tokens are random ids of the config's
vocabulary, cut into documents where the config masks them; reading them is `zexp bench data`. FLOPs are zexp.calc's: a backward
pass is two forward passes, nothing that is computed again counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zexp.bench import flags
from zexp.blocks.resolve import numerics, specs_of
from zexp.calc import match, memory
from zexp.calc import model as calc
from zexp.config.errors import ConfigError, Problems
from zexp.config.identity import semantic_dict
from zexp.config.schema import Run
from zexp.study import ranks
from zexp.study.resolve import Composed, check_execution, layout_of, vocab_size
from zexp.train.phases import Chain, compile_chain


@dataclass(frozen=True)
class Work:
    """What is measured of one config. segment: the semantic block of the first one that would be trained; sequences: of a step,
    in this process."""

    name: str
    run: Run
    model: dict[str, Any]
    segment: dict[str, Any]
    sequences: int
    place: dict[str, Any]

    @property
    def tokens(self) -> int:
        return self.sequences * self.run.seq_len

    @property
    def micro_batch(self) -> int:
        """Sequences of a forward pass."""
        return min(self.run.execution.micro_batch, self.sequences)

    def is_like(self, other: Work) -> bool:
        """Whether a step of the other is the same work: variants of a study may differ in what a step does not show."""
        return self._likeness() == other._likeness()

    def _likeness(self) -> tuple[Any, ...]:
        segment = [self.segment[key] for key in ("precision", "document_mask", "optim")]
        sizes = (self.sequences, self.run.seq_len, self.micro_batch, self.run.parallelism.data)
        return (self.model, segment, sizes, self.place, self.run.kernels, self.run.execution.deterministic)

    def estimate(self) -> memory.Training:
        """What `zexp plan` reckons that the training takes if it keeps its activations, as this step does."""
        return memory.training(
            self.model, replace(layout_of(self.run), checkpointing="none"), seq_len=self.run.seq_len, micro_batch=self.run.execution.micro_batch,
            precision=self.run.precision,
        )  # fmt: skip

    def about(self) -> dict[str, Any]:
        return {
            "name": self.name, "seq_len": self.run.seq_len, "vocab_size": self.model["vocab_size"], "width": self.model["width"],
            "layers": len(self.model["pattern"]), "batch_tokens": self.tokens, "micro_batch": self.micro_batch,
            "precision": self.run.precision, "document_mask": self.segment["document_mask"],
            "deterministic": self.run.execution.deterministic, "kernels": self.run.kernels.backend,
            "parameters": calc.parameters(self.model), "flops_per_token": calc.flops_per_token(self.model, self.run.seq_len),
        }  # fmt: skip

    def blocks(self) -> dict[str, str]:
        """Letter -> the block's name."""
        return {letter: spec.NAME for letter, spec in specs_of(self.model).items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Only the common ones: the config says the rest."""
    flags.add_common(parser, seconds=30.0, of_config=True)


def main(options: argparse.Namespace) -> int:
    """Measure a step of each composed config; the exit code. Raises ConfigError with the mistakes of all of them."""
    problems = Problems()
    problems.extend(flags.problems_of(options))
    works: list[Work] = []
    for one in options.composed:
        try:
            work = work_of(one, options)
            if not any(work.is_like(other) for other in works):
                works.append(work)
        except ConfigError as error:
            problems.extend(error.problems)
    problems.raise_if_any()

    from zexp.bench import step_times

    answer = step_times.measure(works, options.seconds)
    if options.json:
        print(json.dumps(answer))
    else:
        _print(answer)
    return 0


def work_of(one: Composed, options: argparse.Namespace) -> Work:
    """Raises ConfigError with every mistake that concerns a training of random tokens: neither data nor tasks are looked for."""
    run = one.run()
    problems = Problems()
    check_execution(run, problems)
    model, chain = resolved(run, problems)
    problems.raise_if_any()
    ranks.check_batches(run, chain.phases, problems)
    problems.raise_if_any()
    sequences = chain.phases[0].batch_tokens // run.seq_len // run.parallelism.data
    place = flags.place_of(options, run)
    return Work(flags.name_of(one), run, model, chain.segments[0].semantic, sequences, place)


def resolved(run: Run, problems: Problems) -> tuple[dict[str, Any], Chain]:
    """The model and its chain of segments, with names in place of the ids of data. Raises ConfigError, with `problems` before."""
    try:
        model, _ = match.resolve(semantic_dict(run.arch), vocab_size(run, Path.cwd()), run.seq_len)
        chain = compile_chain(
            run, model=model, model_numerics=numerics(model), tokenizer="", packing=lambda name, _source: name
        )
    except ConfigError as error:
        problems.extend(error.problems)
        problems.raise_if_any()
        raise
    return model, chain


def _print(answer: Mapping[str, Any]) -> None:
    from rich.console import Console

    from zexp.bench.tables import machine_line, say_milliseconds, say_rate, show, table
    from zexp.config.tokens import say_tokens
    from zexp.study.show import say_bytes

    console = Console(highlight=False)
    for number, one in enumerate(answer["steps"]):
        if number:
            console.print()
        console.print(machine_line(one["machine"], one["ceilings"]))
        console.print(
            f"{one['name']}: {one['batch_tokens']:,} tokens a step in micro-batches of {one['micro_batch']} × {one['seq_len']}, "
            f"{one['precision']}, kernels {one['kernels']}: {one['tokens_per_second']:,.0f} tokens/s, "
            f"{one['step']['median_seconds']:.3g} s a step "
            f"(median of {one['step']['n']}, best {one['step']['best_seconds']:.3g} s, "
            f"the first {one['first_seconds']:.3g} s).",
            style="bold",
        )  # fmt: skip
        mfu = one["mfu"]
        console.print(
            f"{say_tokens(one['flops_per_token']['train'])}FLOP a token: {say_rate(one['flops_per_second'])}, "
            f"{mfu['of_measured']:.1%} of the {say_rate(mfu['ceiling'])} measured"
            + (
                "."
                if mfu["of_datasheet"] is None
                else f", {mfu['of_datasheet']:.1%} of {say_rate(mfu['datasheet'])} ({mfu['source']})."
            )
        )
        found = one["memory"]
        console.print(
            f"Memory: {say_bytes(found['measured_bytes'])} at most, {say_bytes(found['estimate']['total'])} estimated "
            f"({found['measured_over_estimate']:.0%}). Measured: {found['how']}."
        )
        shown = table("part", "count", "forward", "backward", "both", "share", "FLOP/s")
        for row in one["breakdown"]["rows"]:
            passes = [say_milliseconds(row[key]) if row[key] else "" for key in ("forward_seconds", "backward_seconds")]
            rate = say_rate(row["flops_per_second"]) if row["flops_per_second"] else ""
            shown.add_row(
                row["part"], str(row["count"] or ""), *passes, say_milliseconds(row["seconds"]), f"{row['share']:.1%}", rate
            )
        rest, whole = one["breakdown"]["remainder_seconds"], one["breakdown"]["whole_seconds"]
        shown.add_row("between them", "", "", "", say_milliseconds(rest), f"{rest / whole:.1%}", "")
        shown.add_row("all", "", "", "", say_milliseconds(whole), "100.0%", "", style="bold")
        show(shown, console)
        console.print(
            f"Times are means of {one['breakdown']['laps']} steps that were marked, which took "
            f"{one['breakdown']['marked_over_plain']:.3f} times as "
            "long as the others. A part is its layers with their norms.", style="dim",
        )  # fmt: skip
        for text in one["not_measured"]:
            console.print(f"Not measured: {text}", style="dim")
