"""Every block alone, on a normed input: time and FLOP/s of its forward and its backward pass, beside the machine's ceilings.

Axes multiply: `--width 256 512 --dtype fp32 bf16` measures each block at four points. FLOPs are those of the blocks' own
formulas (zexp/blocks/*/spec.py), a backward pass twice a forward pass. Nothing here imports torch until something is measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from zexp.bench import flags
from zexp.blocks import options as block_options
from zexp.blocks.base import BlockSpec
from zexp.blocks.table import TABLE, spec_class
from zexp.calc.memory import saved_bytes
from zexp.config.errors import ConfigError
from zexp.kernels import select

DTYPES = ("fp32", "bf16")
HEAD_DIM = 64  # where nothing is said and it divides
PLOTS = (".html", ".svg")
RESIDUAL_BYTES = 4  # of a number that enters or leaves a block: the residual stream is in fp32


@dataclass(frozen=True)
class Heads:
    """Which keys say how a block is cut into heads. count, width: keys, None = follows from the other; whole: how many model
    widths all heads together have, or the key that says it."""

    count: str | None
    width: str | None
    whole: int | str = 1


HEADS = {
    "a": Heads("heads", "head_dim"), "w": Heads("heads", "head_dim"), "g": Heads("heads", None, 2),
    "l": Heads("key_heads", "key_head_dim"), "t": Heads("heads", None), "x": Heads("heads", None), "s": Heads("heads", None),
    "m": Heads(None, "head_dim", "expand"), "k": Heads(None, "head_dim"),
}  # fmt: skip


def sizes(letter: str, width: int) -> dict[str, Any]:
    """Of the keys that have no default, besides heads: as multiples of the model width that are usual."""
    gated = max(8, round(8 * width / 3 / 8) * 8)  # the parameters of 4 · width without a gate (Shazeer 2020, arXiv:2002.05202)
    return {
        "d": {"width": gated},
        "e": {"width": max(8, gated // 16 * 8)},  # two experts of eight are one MLP
        "g": {"mlp_width": 4 * width},
        "n": {"width": width},
        "w": {"window": 256},
    }.get(letter, {})


@dataclass(frozen=True)
class Point:
    """One block at one size. spec: completed; keys: as they were written; axis_keys: those of them that --key gives."""

    letter: str
    width: int
    seq_len: int
    batch: int
    dtype: str
    kernels: str
    keys: dict[str, Any]
    axis_keys: dict[str, Any]
    spec: BlockSpec

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    @property
    def flops(self) -> float:
        """Of a forward pass over all tokens."""
        return self.tokens * self.spec.flops(self.width, self.seq_len)

    @property
    def parameters(self) -> int:
        """Of one layer that is not the model's first, or of a shared block with one call."""
        call = getattr(self.spec, "call_parameters", None)
        return self.spec.parameters(self.width) + (0 if call is None else call(self.width))

    @property
    def kept_bytes(self) -> float:
        """What stays between the passes, by zexp.calc.memory."""
        return self.tokens * saved_bytes(self.spec, self.width, self.seq_len, self.dtype)

    @property
    def moved_bytes(self) -> dict[str, float]:
        """The least that each pass reads and writes: weights and their gradients, the stream and its gradient, what is kept."""
        weights, stream = 4 * self.parameters, self.tokens * self.width * RESIDUAL_BYTES
        return {"forward": weights + 2 * stream + self.kept_bytes, "backward": 2 * weights + 2 * stream + self.kept_bytes}

    @property
    def heads(self) -> tuple[int | None, int | None]:
        """How many heads there are and how wide each is; None for a block without."""
        if (cut := HEADS.get(self.letter)) is None:
            return None, None
        full = asdict(self.spec)
        whole = self.width * (cut.whole if isinstance(cut.whole, int) else full[cut.whole])
        count = full[cut.count] if cut.count is not None else whole // full[cut.width or ""]
        return count, full[cut.width] if cut.width is not None else whole // count

    def to_json(self) -> dict[str, Any]:
        full = asdict(self.spec)
        heads, head_dim = self.heads
        return {
            "block": self.spec.NAME, "letter": self.letter, "width": self.width, "seq_len": self.seq_len, "batch": self.batch,
            "heads": heads, "head_dim": head_dim, "state_size": full.get("state_size"), "keys": self.keys,
            "axis_keys": self.axis_keys, "dtype": self.dtype, "kernels": self.kernels, "parameters": self.parameters,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.spec.NAME} width {self.width}, {self.batch} × {self.seq_len}, {self.dtype}, kernels {self.kernels}"


@dataclass(frozen=True)
class LeftOut:
    """A point of the grid that is not measured, and why."""

    about: dict[str, Any]
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {**self.about, "reason": self.reason}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The axes, and what is measured at each point."""
    flags.add_common(parser, seconds=60.0, of_config=False)
    names = ", ".join(f"{letter} {spec_class(letter).NAME}" for letter in TABLE)
    parser.add_argument("--blocks", nargs="+", metavar="BLOCK", help=f"letters or names (default: all: {names})")
    parser.add_argument("--width", nargs="+", type=int, default=[256], metavar="D", help="model widths (default: 256)")
    parser.add_argument(
        "--seq-len", nargs="+", type=int, default=[512], metavar="T", help="tokens of a sequence (default: 512)"
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[4], metavar="B", help="sequences (default: 4)")
    parser.add_argument("--heads", nargs="+", type=int, metavar="H", help="of blocks that have them")
    parser.add_argument(
        "--head-dim", nargs="+", type=int, metavar="P", help=f"of blocks that have heads (default: {HEAD_DIM} where it divides)"
    )
    parser.add_argument("--state-size", nargs="+", type=int, metavar="N", help="of Mamba1 and Mamba2 (default: the blocks')")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="bf16: autocast, fp32 weights (default: both)"
    )
    parser.add_argument("--kernels", nargs="+", choices=select.CHOICES, default=["auto"], help="backends (default: auto)")
    parser.add_argument(
        "--key", action="append", default=[], metavar="BLOCK.KEY=V,V",
        help="a further axis over any key of a block (zexp/blocks/*/spec.py): --key m.chunk=64,256 --key g.lora_rank.mlp=0,16",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the roofline: FILE.html or FILE.svg")


def main(options: argparse.Namespace) -> int:
    """Measure the grid; the exit code. Raises ConfigError for what cannot be measured at all."""
    flags.check(_problems(options))
    wanted, left_out = points(options)
    if not wanted:
        raise ConfigError([one.reason for one in left_out])
    if options.plot is not None and not options.plot.resolve().parent.is_dir():
        raise ConfigError(f"--plot {options.plot}: there is no folder {options.plot.resolve().parent}. Make it first.")

    from zexp.bench import block_times

    answer = block_times.measure(wanted, left_out, options.device, options.threads, options.seconds)
    if options.plot is not None:
        from zexp.bench import roofline

        roofline.write(answer, options.plot)
        answer["plot"] = str(options.plot)
    if options.json:
        print(json.dumps(answer))
    else:
        _print(answer)
    return 0


def letters_of(said: Sequence[str] | None) -> list[str]:
    """The blocks that are meant, by letter or name. Raises ConfigError naming all that there are."""
    if said is None:
        return list(TABLE)
    names = {spec_class(letter).NAME: letter for letter in TABLE}
    unknown = [one for one in said if one not in TABLE and one.lower() not in names]
    if unknown:
        known = ", ".join(f"{letter} ({name})" for name, letter in names.items())
        raise ConfigError([f"--blocks {one}: there is no such block. There are {known}." for one in unknown])
    return list(dict.fromkeys(one if one in TABLE else names[one.lower()] for one in said))


def points(options: argparse.Namespace) -> tuple[list[Point], list[LeftOut]]:
    """The grid's points, block by block, and those that no block can have. Raises ConfigError for an axis that is nobody's."""
    letters = letters_of(options.blocks)
    own = _own_axes(options.key, letters)
    for flag, values, having in (
        ("--heads", options.heads, HEADS), ("--head-dim", options.head_dim, HEADS), ("--state-size", options.state_size, "mr"),
    ):  # fmt: skip
        if values and not any(letter in having for letter in letters):
            raise ConfigError(
                f"{flag}: none of the blocks {', '.join(letters)} has it. Leave it out, or add one of {', '.join(having)}."
            )
    found: list[Point] = []
    left_out: list[LeftOut] = []
    for letter in letters:
        headed, stated = letter in HEADS, letter in "mr"
        axes = [
            options.width, options.seq_len, options.batch, options.heads if headed and options.heads else [None],
            options.head_dim if headed and options.head_dim else [None],
            options.state_size if stated and options.state_size else [None],
            own.get(letter, [{}]), options.dtype, options.kernels,
        ]  # fmt: skip
        for width, seq_len, batch, heads, head_dim, state, keys, dtype, kernels in itertools.product(*axes):
            about = {
                "block": spec_class(letter).NAME, "letter": letter, "width": width, "seq_len": seq_len, "batch": batch,
                "heads": heads, "head_dim": head_dim, "state_size": state, "keys": keys, "dtype": dtype, "kernels": kernels,
            }  # fmt: skip
            written = _merged(sizes(letter, width), {} if state is None else {"state_size": state}, keys)
            cut, problems = _cut(letter, width, heads, head_dim, written)
            spec, more = (None, []) if problems else _spec(letter, width, _merged(cut, written))
            if spec is None:
                left_out.append(LeftOut(about, " ".join([*problems, *more])))
                continue
            found.append(Point(letter, width, seq_len, batch, dtype, kernels, _merged(cut, written), keys, spec))
    return found, left_out


def _problems(options: argparse.Namespace) -> list[str]:
    found = flags.problems_of(options)
    for name in ("width", "seq_len", "batch", "heads", "head_dim", "state_size"):
        found += [f"--{name.replace('_', '-')} {value}: at least 1." for value in getattr(options, name) or () if value < 1]
    if options.plot is not None and options.plot.suffix not in PLOTS:
        found.append(f"--plot {options.plot}: a name that ends in {' or '.join(PLOTS)}.")
    return found


def _own_axes(said: Sequence[str], letters: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Letter -> every combination of the values that --key gives it."""
    axes: dict[str, dict[str, list[Any]]] = {}
    problems = []
    for text in said:
        key, equals, values = text.partition("=")
        block, dot, name = key.partition(".")
        try:
            (letter,) = letters_of([block])
            listed = yaml.safe_load(f"[{values}]")
        except (ConfigError, yaml.YAMLError):
            letter, listed = "", None
        if not (letter and equals and dot and name and listed):
            problems.append(f"--key {text}: write a block, a key of it and values: --key m.state_size=64,128.")
        elif letter not in letters:
            problems.append(
                f"--key {text}: the block {letter} is not among those measured ({', '.join(letters)}). Add it to --blocks."
            )
        elif name in axes.setdefault(letter, {}):
            problems.append(f"--key {text}: {block}.{name} is given twice. Write all values behind one --key.")
        else:
            axes[letter][name] = listed
    if problems:
        raise ConfigError(problems)
    return {
        letter: [
            _merged(*(_nested(name, value) for name, value in zip(named, values, strict=True)))
            for values in itertools.product(*named.values())
        ]
        for letter, named in axes.items()
    }


def _nested(name: str, value: Any) -> dict[str, Any]:
    first, _, rest = name.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _merged(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """Later ones win, key by key."""
    made: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            both = isinstance(value, dict) and isinstance(made.get(key), dict)
            made[key] = _merged(made[key], value) if both else value
    return made


def _cut(
    letter: str, width: int, heads: int | None, head_dim: int | None, written: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The keys that cut a block into so many heads, or heads so wide; what does not divide."""
    if letter not in HEADS or any(key in written for key in (HEADS[letter].count, HEADS[letter].width)):
        return {}, []
    cut = HEADS[letter]
    times = (
        cut.whole
        if isinstance(cut.whole, int)
        else written.get(cut.whole, spec_class(letter).__dataclass_fields__[cut.whole].default)
    )
    whole = width * times
    if heads is None and head_dim is None:
        head_dim = HEAD_DIM if whole % HEAD_DIM == 0 else whole
    name = spec_class(letter).NAME
    if head_dim is None:
        assert heads is not None
        if whole % heads:
            return {}, [f"{name} at width {width}: {heads} heads do not divide {whole}."]
        head_dim = whole // heads
    elif heads is None:
        if whole % head_dim:
            return {}, [f"{name} at width {width}: heads of {head_dim} do not divide {whole}."]
        heads = whole // head_dim
    elif heads * head_dim != whole and None in (cut.count, cut.width):
        return {}, [f"{name} at width {width}: {heads} heads of {head_dim} are not the {whole} that its heads have together."]
    return {key: value for key, value in ((cut.count, heads), (cut.width, head_dim)) if key is not None}, []


def _spec(letter: str, width: int, keys: Mapping[str, Any]) -> tuple[BlockSpec | None, list[str]]:
    where = spec_class(letter).NAME
    spec, problems = block_options.read(spec_class(letter), keys, where)
    if spec is None:
        return None, problems
    problems = spec.problems(width, f"{where} at width {width}")
    return (None, problems) if problems else (spec.completed(width), [])


def _heads_of(row: Mapping[str, Any]) -> str:
    return " × ".join(str(row[key]) for key in ("heads", "head_dim") if row[key] is not None)


_AXES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "width": lambda row: str(row["width"]),
    "tokens": lambda row: f"{row['batch']} × {row['seq_len']}",
    "heads": _heads_of,
    "state": lambda row: str(row["state_size"] or ""),
    "keys": lambda row: " ".join(f"{key}={value}" for key, value in row["axis_keys"].items()),
    "dtype": lambda row: str(row["dtype"]),
    "kernels": lambda row: str(row["kernels"]),
}  # fmt: skip


def _print(answer: Mapping[str, Any]) -> None:
    from rich.console import Console

    from zexp.bench.tables import machine_line, say_milliseconds, show, table
    from zexp.study.show import say_bytes

    console = Console(highlight=False)
    console.print(machine_line(answer["machine"], answer["ceilings"]))
    rows = answer["rows"]
    largest = max(row[name]["flops_per_second"] for row in rows for name in ("forward", "backward"))
    unit, factor = ("TFLOP/s", 1e12) if largest >= 1e12 else ("GFLOP/s", 1e9)
    axes = {name: [text(row) for row in rows] for name, text in _AXES.items()}
    alike = {name: texts[0] for name, texts in axes.items() if len(set(texts)) == 1}
    shown = table(
        "block", *(name for name in axes if name not in alike), "forward", unit, "share", "backward", unit, "share", "FLOP/B",
        title=", ".join(f"{name} {text}" for name, text in alike.items() if text),
    )  # fmt: skip
    for number, row in enumerate(rows):
        cells = [f"{row['block']} ({row['letter']})", *(texts[number] for name, texts in axes.items() if name not in alike)]
        for name in ("forward", "backward"):
            one = row[name]
            cells += [
                say_milliseconds(one["median_seconds"]),
                f"{one['flops_per_second'] / factor:.3g}",
                f"{one['share_of_matmul']:.0%}",
            ]
        shown.add_row(*cells, f"{row['intensity']:.3g}")
    show(shown, console)
    console.print(
        "Times are medians. Shares are of the machine's rate in that precision. FLOP/B: of both passes, over the least bytes "
        "that they move.",
        style="dim",
    )  # fmt: skip
    if answer["largest_peak_bytes"] is not None:
        console.print(f"Memory on the device: at most {say_bytes(answer['largest_peak_bytes'])}.")
    for reason, count in Counter(one["reason"] for one in answer["left_out"]).items():
        console.print(f"Left out{f' ({count} points)' if count > 1 else ''}: {reason}", style="yellow", markup=False)
    for text in answer["not_measured"]:
        console.print(f"Not measured: {text}", style="dim")
    if "plot" in answer:
        console.print(f"Roofline: {answer['plot']}", soft_wrap=True)
