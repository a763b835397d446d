"""How fast the input pipeline delivers: batches of a config's mix from the packed corpora in the store, and its tokenizer.

Nothing is trained or built: tokenizer, corpora and packings must be in the store already. Batches are read as the training loop
reads them, one after the other from the beginning of each phase, in this process; the files may lie in the system's cache.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zexp.bench import flags
from zexp.config.places import user_conf_dir
from zexp.study import execute
from zexp.study.plan import Plan

NEEDED = ("tokenizer", "corpus", "packing")
TEXT_BYTES = 4_000_000  # of each corpus, at most, that are tokenized


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The common ones, and what to compare with."""
    flags.add_common(parser, seconds=20.0, of_config=True)
    parser.add_argument(
        "--against", type=float, metavar="TOKENS_PER_SECOND",
        help="what a training reaches (zexp bench step): the share of a step that reading its batch takes is said",
    )  # fmt: skip


def main(options: argparse.Namespace) -> int:
    """Measure each composed config; the exit code. Raises ConfigError, also where something is not built yet."""
    problems = flags.problems_of(options)
    if options.against is not None and not (options.against > 0 and math.isfinite(options.against)):
        problems.append(f"--against {options.against:g}: tokens a second, a finite number above 0.")
    flags.check(problems)
    plan, _, store, variants = execute.planned(options.composed, options.request)
    flags.check(missing(plan, options.request.words))

    from zexp.bench import data_times

    answer = data_times.measure(store, variants, options)
    if options.json:
        print(json.dumps(answer))
    else:
        _print(answer)
    return 0


def missing(plan: Plan, words: Sequence[str]) -> list[str]:
    """A problem for each thing that has to be built first, and at its end how."""
    stages = [stage for stage in plan.stages.values() if stage.kind in NEEDED and not stage.cached]
    if not stages:
        return []
    listed = "\n".join(f"  {stage.label} ({stage.id})" for stage in stages)
    taken = ["--config-dir", str(user_conf_dir(Path.cwd()))]  # by itself
    overrides = shlex.join(words[2:] if list(words[:2]) == taken else words)
    command = f"zexp run {overrides}".rstrip()
    return [
        f"zexp bench data reads packed corpora, and of this config there is not built yet:\n{listed}\n"
        f"  `{command}` builds it before it trains (stopped with Ctrl-C then, it keeps what is built)."
    ]


def against(tokens_per_second: float, needed: float | None) -> dict[str, float] | None:
    """needed: what a training consumes. share_of_step: of a step's time, that the loop waits for its batch."""
    if needed is None:
        return None
    return {
        "tokens_per_second": needed,
        "times_faster": tokens_per_second / needed,
        "share_of_step": needed / tokens_per_second,
    }


def _print(answer: Mapping[str, Any]) -> None:
    from rich.console import Console

    from zexp.bench.tables import say_milliseconds, show, table

    console = Console(highlight=False)
    machine = answer["machine"]
    console.print(f"{machine['device']}, store {answer['store']}", soft_wrap=True)
    shown = table(
        "phase", "batch", "sources", "first read", "a batch", "tokens/s", *(["share of a step"] if answer["against"] else [])
    )
    for row in answer["reading"]:
        cells = [row["phase"], f"{row['batch_tokens']:,}", ", ".join(row["sources"]), say_milliseconds(row["first_seconds"])]
        cells += [say_milliseconds(row["median_seconds"]), f"{row['tokens_per_second']:,.0f}"]
        shown.add_row(*cells, *([f"{row['against']['share_of_step']:.2%}"] if row["against"] else []))
    show(shown, console)
    shown = table("tokenizing", "text", "MB/s", "tokens/s", "bytes/token")
    for row in answer["tokenizing"]:
        cells = [row["source"], f"{row['bytes'] / 1e6:.3g} MB", f"{row['bytes_per_second'] / 1e6:.3g}"]
        shown.add_row(*cells, f"{row['tokens_per_second']:,.0f}", f"{row['bytes'] / row['tokens']:.3g}")
    show(shown, console)
    for text in answer["not_measured"]:
        console.print(f"Not measured: {text}", style="dim")
