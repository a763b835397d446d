"""Which sizes of an architecture are fast here at one number of parameters: widths, MLP widths, heads, rows of the embedding.

The base is what `arch.match={parameters: …}` chooses; every candidate differs from it in one thing. Each distinct layer of a
candidate is built once, all candidates are run forward and backward in turns, and a layer's time counts as often as the layer
stands in the pattern. What wins is then built whole and timed beside the base.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zexp.bench import flags
from zexp.bench.candidates import Candidate, candidates
from zexp.bench.step import resolved
from zexp.config.errors import ConfigError, Problems
from zexp.config.identity import semantic_dict
from zexp.config.schema import Run
from zexp.config.tokens import parse_count
from zexp.study.resolve import check_execution, vocab_size


@dataclass(frozen=True)
class Question:
    """What is measured. parameters: the target; vocab_size: the tokenizer's."""

    name: str
    run: Run
    parameters: int
    tolerance: float
    vocab_size: int
    candidates: list[Candidate]
    document_mask: bool
    place: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Of one pass."""
        return self.run.execution.micro_batch * self.run.seq_len


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The budget, the family, and which sizes to try."""
    flags.add_common(parser, seconds=120.0, of_config=True)
    parser.add_argument("--parameters", required=True, metavar="N", help="the budget: 50M, 1.3B")
    parser.add_argument(
        "--arch", metavar="NAME", help="whose pattern and shape: a name under conf/arch; the same as the override arch=NAME"
    )
    parser.add_argument(
        "--width", type=_widths, metavar="D,…", help="model widths to try (default: multiples of 8 to 256 nearby)"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.03, metavar="SHARE",
        help="how far from the budget a candidate may be, as a share of it (default: 0.03)",
    )  # fmt: skip
    parser.set_defaults(overrides=overrides)


def _widths(words: str) -> list[int]:
    """By commas, because Hydra's overrides come behind it."""
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{words!r}: whole numbers with commas between them") from None


def overrides(options: argparse.Namespace, words: list[str]) -> list[str]:
    """What --arch says, as Hydra takes it. Raises ConfigError where `words` say it, too."""
    if options.arch is None:
        return []
    if any(word.startswith("arch=") for word in words):
        raise ConfigError(f"--arch {options.arch} and an override arch=… are both given. Keep one.")
    return [f"arch={options.arch}"]


def main(options: argparse.Namespace) -> int:
    """Measure the candidates; the exit code. Raises ConfigError."""
    question = question_of(options)

    from zexp.bench import size_times

    answer = size_times.measure(question, options.seconds)
    if options.json:
        print(json.dumps(answer))
    else:
        _print(answer)
    return 0


def question_of(options: argparse.Namespace) -> Question:
    """Raises ConfigError with every mistake of the arguments, then of the config, then where no size fits."""
    problems = Problems()
    problems.extend(flags.problems_of(options))
    if not (0 < options.tolerance < 1 and math.isfinite(options.tolerance)):
        problems.add(f"--tolerance {options.tolerance:g}: a share above 0 and below 1; 0.03 is 3 %.")
    problems.extend(f"--width {width}: at least 1." for width in options.width or () if width < 1)
    parameters = 0
    try:
        parameters = parse_count(options.parameters, "--parameters", "number")
    except ConfigError as error:
        problems.extend(error.problems)
    if len(options.composed) > 1:
        problems.add(f"{len(options.composed)} configs were composed: `zexp bench size` compares sizes of one. Leave -m out.")
    problems.raise_if_any()
    (one,) = options.composed
    run = one.run()
    if parameters < 1:
        problems.add(f"--parameters {options.parameters}: at least 1.")
    if run.arch.match is not None:
        problems.add("arch.match is what --parameters says here. Leave it out.")
    check_execution(run, problems)
    _, chain = resolved(run, problems)
    problems.raise_if_any()
    arch = {key: value for key, value in semantic_dict(run.arch).items() if key != "match"}
    vocab = vocab_size(run, Path.cwd())
    found = candidates(arch, vocab, parameters, options.tolerance, options.width)
    place = flags.place_of(options, run)
    mask = bool(chain.segments[0].semantic["document_mask"])
    return Question(flags.name_of(one), run, parameters, options.tolerance, vocab, found, mask, place)


def _print(answer: Mapping[str, Any]) -> None:
    from rich.console import Console

    from zexp.bench.tables import machine_line, say_rate, show, table

    console = Console(highlight=False)
    console.print(machine_line(answer["machine"], answer["ceilings"]))
    console.print(
        f"{answer['name']} at {answer['parameters']:,} parameters ± {answer['tolerance']:.0%}: "
        f"{len(answer['candidates'])} sizes, "
        f"{answer['micro_batch']} × {answer['seq_len']} tokens, {answer['precision']}, in {answer['rounds']} rounds.",
        style="bold",
    )  # fmt: skip
    shown = table("size", "changed", "parameters", "tokens/s", "FLOP/s", "share", "speed", "95 %")
    for row in sorted(answer["candidates"], key=lambda row: -float(row["over_base"]["median"])):
        ratio = row["over_base"]
        cells = [row["name"], row["factor"], f"{row['parameters'] / 1e6:,.4g} M", f"{row['tokens_per_second']:,.0f}"]
        cells += [say_rate(row["flops_per_second"]), f"{row['share_of_matmul']:.0%}", f"{ratio['median']:.3f}"]
        cells += ["" if row["factor"] == "base" else f"{ratio['low']:.3f}–{ratio['high']:.3f}"]
        shown.add_row(*cells, style=None if row["verdict"] in ("faster", "base") else "dim")
    show(shown, console)
    console.print(
        "Speed: tokens/s over the base's, the median of the rounds with its 95 % interval; dim: not faster than the base for "
        "certain. One comparison in twenty errs by chance.", style="dim",
    )  # fmt: skip
    for text in answer["facts"]:
        console.print(f"- {text}")
    check = answer["whole"]
    if check is not None:
        console.print(
            f"Whole models in turns: {check['name']} {check['tokens_per_second']:,.0f} tokens/s, the base "
            f"{check['base_tokens_per_second']:,.0f}: "
            f"{check['over_base']['median']:.3f} times ({check['over_base']['low']:.3f}–{check['over_base']['high']:.3f})."
        )
    for text in answer["not_measured"]:
        console.print(f"Not measured: {text}", style="dim")
