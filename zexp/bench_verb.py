"""`zexp bench blocks|step|data|size|kernels`: which part, its arguments, and the configs of those that take overrides. No torch.

A part is a module of zexp.bench with `add_arguments(parser)` and `main(options) -> int` (zexp.bench.flags.Part), imported when it
is asked for.
"""

from __future__ import annotations

import argparse
import difflib
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

from zexp.config.errors import ConfigError

if TYPE_CHECKING:
    from zexp.bench.flags import Part
    from zexp.study.execute import Request
    from zexp.study.resolve import Composed


@dataclass(frozen=True)
class _Entry:
    """A line of the table. composes: Hydra's overrides may follow the part's own arguments."""

    module: str
    text: str
    composes: bool = False


PARTS = {
    "blocks": _Entry(
        "zexp.bench.blocks", "every block alone, forward and backward, over widths, lengths, heads, states, precisions"
    ),
    "step": _Entry(
        "zexp.bench.step", "a training step of a config: tokens/s, MFU, memory, and which block takes how long", composes=True
    ),
    "data": _Entry(
        "zexp.bench.data", "how fast batches of a config's mix are read, and its texts are tokenized", composes=True
    ),
    "size": _Entry(
        "zexp.bench.size", "which widths, heads and vocabularies are fast here, at one number of parameters", composes=True
    ),
    "kernels": _Entry("zexp.bench.kernels", "each operation with each backend, beside its fp32 reference"),
}
USAGE = f"""\
usage: zexp bench {"|".join(PARTS)} [arguments] [overrides]

What this machine does with zexp's parts, measured: nothing is taken from a store but the corpora of `data`, and nothing is
written but a plot that is asked for. Each part prints a table, and with --json one JSON object instead.

{chr(10).join(f"  {name:<9}{entry.text}" for name, entry in PARTS.items())}

`zexp bench PART --help` lists a part's arguments. step, data and size take a config as Hydra's overrides make it, behind their
own arguments: zexp bench step --json arch=zamba2_10m precision=bf16
"""


def bench(arguments: list[str]) -> int:
    """Run one part of the verb; the exit code. Raises ConfigError."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if not arguments or arguments[0] not in PARTS:
        said = arguments[0] if arguments else None
        near = difflib.get_close_matches(said or "", PARTS, n=1)
        hint = f" Did you mean `zexp bench {near[0]}`?" if near else ""
        problem = "zexp bench: which part?" if said is None else f"zexp bench: {said!r} is no part.{hint}"
        raise ConfigError(f"{problem} There are {', '.join(PARTS)}; `zexp bench --help` says what each measures.")
    name, words = arguments[0], arguments[1:]
    entry = PARTS[name]
    part = cast("Part", import_module(entry.module))
    usage = "%(prog)s [arguments] [overrides]" if entry.composes else None
    parser = argparse.ArgumentParser(
        prog=f"zexp bench {name}", usage=usage, description=(part.__doc__ or "").partition("\n\n")[0],
        epilog="The overrides are those of `zexp run`, -m included." if entry.composes else None, allow_abbrev=False,
    )  # fmt: skip
    part.add_arguments(parser)
    if not entry.composes:
        return part.main(parser.parse_args(words))
    options, overrides = parser.parse_known_args(words)
    if (more := getattr(options, "overrides", None)) is not None:  # which the part makes of its own arguments
        overrides = [*more(options, overrides), *overrides]
    from zexp.hydra_app import hydra_verb

    def act(composed: list[Composed], request: Request) -> int:
        options.composed, options.request = composed, request
        return part.main(options)

    return hydra_verb(f"bench {name}", overrides, act=act)


def completed(words: list[str]) -> list[str] | None:
    """What the last of the words behind `zexp bench` may become; None = what Hydra completes."""
    if len(words) == 1:
        return [name for name in PARTS if name.startswith(words[0])]
    entry = PARTS.get(words[0])
    return None if entry is not None and entry.composes and not words[-1].startswith("-") else []
