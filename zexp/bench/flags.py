"""What the parts of `zexp bench` have in common on the command line. No torch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from typing import Any, Protocol

from zexp.config.errors import ConfigError
from zexp.config.schema import Run
from zexp.study.resolve import Composed

DEVICES = ("auto", "cpu", "cuda")


class Part(Protocol):
    """A module of one part of the verb."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The part's own arguments."""

    def main(self, options: argparse.Namespace) -> int:
        """The exit code. options.composed: the composed configs of a part that takes Hydra's overrides, and options.request the
        request that they came with. Raises ConfigError.
        """


def add_common(parser: argparse.ArgumentParser, *, seconds: float, of_config: bool) -> None:
    """--json, --device, --threads and --seconds. of_config: a composed config says device and threads, these replace them."""
    device = "execution.device" if of_config else "a GPU if there is one"
    threads = "parallelism.threads" if of_config else "as many as torch takes by itself"
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    parser.add_argument("--device", choices=DEVICES, help=f"where to measure (default: {device})")
    parser.add_argument("--threads", type=int, metavar="N", help=f"CPU threads (default: {threads})")
    parser.add_argument(
        "--seconds", type=float, default=seconds, metavar="S",
        help=f"how long to repeat what is measured, all together (default: {seconds:g}); a few repeats are made anyway",
    )  # fmt: skip


def problems_of(options: argparse.Namespace) -> list[str]:
    """What is wrong with the common arguments, one text each."""
    found = []
    if not (options.seconds > 0 and math.isfinite(options.seconds)):
        found.append(f"--seconds {options.seconds:g}: a finite number above 0.")
    if options.threads is not None and options.threads < 1:
        found.append(f"--threads {options.threads}: at least 1.")
    return found


def check(problems: Iterable[str]) -> None:
    """Raises ConfigError if there are any."""
    if texts := list(problems):
        raise ConfigError(texts)


def place_of(options: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Device and threads to measure a composed config with: {device, threads}."""
    return {"device": options.device or run.execution.device, "threads": options.threads or run.parallelism.threads}


def name_of(one: Composed) -> str:
    """What a composed config is called in a table: its architecture and its axes."""
    axes = {key: value for key, value in one.axes.items() if key != "arch"}
    arch = one.choices.get("arch") or "arch"
    return ",".join([arch, *(f"{key}={value}" for key, value in axes.items())])
