"""Sizes that meet a target: arch.match={parameters: 10M} to a model width and MLP widths.

The architecture as written gives the shape. At another model width, heads keep their own width and change in number,
inner widths (SCALED_WIDTHS) keep their ratio to the model width, and everything else stays as it is written: layers, state
sizes, ranks, groups, experts. Model widths are multiples of 8 at which every block is legal. Of these the nearest to
the target is taken; then all inner widths are changed by one factor, in steps of 8 (or of 1, where 8 are too coarse).
Where no such size is within 1 %, the multiples of 8 between two of these widths are tried, with the number of heads that is
legal there and nearest to the ratio.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from zexp.blocks import options, pattern
from zexp.blocks.base import BlockSpec
from zexp.blocks.resolve import resolve_model
from zexp.blocks.table import spec_class
from zexp.calc import model as calc
from zexp.config.errors import ConfigError, Problems
from zexp.config.tokens import parse_count

TOLERANCE = 0.01
STEP = 8
MAX_WIDTH = 32_768  # above the widest dense models
NEIGHBOURS = 4  # model widths tried on each side of the target
MAX_FACTOR = 8.0  # by which inner widths may leave their ratio, up or down

# quantity -> what it is in, for people
QUANTITIES = {
    "parameters": "parameters",
    "active_parameters": "active parameters",
    "train_flops_per_token": "training FLOPs a token",
}
INFERENCE = "inference_bytes@"


@dataclass(frozen=True, kw_only=True)
class Match:
    """What was asked for, what was found, and the keys that changed: key -> (as written, chosen)."""

    quantity: str
    target: int
    found: float
    changed: dict[str, tuple[int, int]]

    @property
    def residual(self) -> float:
        """How far above the target, as a share of it."""
        return self.found / self.target - 1

    def to_json(self) -> dict[str, Any]:
        changed = {key: list(pair) for key, pair in self.changed.items()}
        return {
            "quantity": self.quantity, "target": self.target, "found": self.found, "residual": self.residual, "changed": changed,
        }  # fmt: skip

    def line(self) -> str:
        """One sentence for people."""
        sizes = ", ".join(f"{key} {old} → {new}" for key, (old, new) in self.changed.items() if old != new)
        side = "above" if self.residual >= 0 else "below"
        return (
            f"{sizes or 'the sizes as written'}; {self.found:,.0f} {_say(self.quantity)}, "
            f"{abs(self.residual):.2%} {side} {self.target:,}."
        )


def resolve(arch: Mapping[str, Any], vocab_size: int, seq_len: int) -> tuple[dict[str, Any], Match | None]:
    """The semantic block of a model, as resolve_model makes it, with the sizes that arch.match asks for; and what was solved.

    seq_len: labels of a sequence, for train_flops_per_token. Raises ConfigError with every problem of the architecture and of
    the target; where no size is within 1 %, it names the nearest.
    """
    asked = arch.get("match")
    written = {key: value for key, value in arch.items() if key != "match"}
    problems = Problems()
    model: dict[str, Any] = {}
    target: tuple[str, int] | None = None
    try:
        model = resolve_model(written, vocab_size)
    except ConfigError as error:
        problems.extend(error.problems)
    if asked is not None:
        target = _target(asked, problems)
    problems.raise_if_any()
    if target is None:
        return model, None
    quantity, number = target
    return _Search(written, vocab_size, quantity, number, _measure(quantity, max(seq_len, 1))).solve()


def at_width(arch: Mapping[str, Any], vocab_size: int, parameters: int, width: int) -> Size | None:
    """The architecture at that model width, its inner widths solved for so many parameters: the nearest that there is, however
    far. None where no number of heads is legal at that width. arch: as `resolve` takes it, without a match, and legal."""
    search = _Search(arch, vocab_size, "parameters", parameters, _measure("parameters", 1))
    if any(_heads(spec, arch["width"], width) is None for spec in search.specs.values()):
        return None
    return search.solved(width, [])


def nearest(arch: Mapping[str, Any], vocab_size: int, parameters: int) -> Size:
    """The size of the architecture that is nearest to so many parameters among those that `resolve` tries, however far."""
    search = _Search(arch, vocab_size, "parameters", parameters, _measure("parameters", 1))
    return min(search.sizes(), key=lambda size: abs(size.value - parameters))


def _say(quantity: str) -> str:
    return QUANTITIES.get(quantity) or f"bytes of bf16 weights and cache at {quantity.removeprefix(INFERENCE)} tokens"


def _target(asked: Any, problems: Problems) -> tuple[str, int] | None:
    known = f"{', '.join(QUANTITIES)} or {INFERENCE}4096"
    if not isinstance(asked, Mapping) or len(asked) != 1:
        found = ", ".join(map(str, asked)) if isinstance(asked, Mapping) and asked else repr(asked)
        problems.add(f"arch.match: one quantity is matched, found {found}.\n  Write for example {{parameters: 10M}}: {known}.")
        return None
    ((quantity, value),) = asked.items()
    try:
        if str(quantity).startswith(INFERENCE):
            context = parse_count(quantity.removeprefix(INFERENCE), f"arch.match: the context of {quantity}", "token count")
            if context < 1:
                problems.add(f"arch.match.{quantity}: a context has at least 1 token.")
            quantity = f"{INFERENCE}{context}"
        elif quantity not in QUANTITIES:
            problems.add(f"arch.match.{quantity}: this cannot be matched. Choose one of {known}.")
        number = parse_count(value, f"arch.match.{quantity}", "number")
    except ConfigError as error:
        problems.extend(error.problems)
        return None
    if number < 1:
        problems.add(f"arch.match.{quantity} = {value}: it must be at least 1.")
    return quantity, number


def _measure(quantity: str, seq_len: int) -> Callable[[dict[str, Any]], float]:
    if quantity == "parameters":
        return lambda model: calc.parameters(model)["total"]
    if quantity == "active_parameters":
        return lambda model: calc.parameters(model)["active"]
    if quantity == "train_flops_per_token":
        return lambda model: calc.flops_per_token(model, seq_len)["train"]
    context = int(quantity.removeprefix(INFERENCE))
    return lambda model: 2 * calc.parameters(model)["total"] + calc.cache_bytes(model, context)


@dataclass(frozen=True)
class Size:
    """A model at one size: the keys that were chosen for it."""

    model: dict[str, Any]
    chosen: dict[str, int]
    value: float


@dataclass
class _Search:
    """Model widths, then a factor on inner widths, until the measured quantity is the target."""

    arch: Mapping[str, Any]
    vocab_size: int
    quantity: str
    target: int
    measure: Callable[[dict[str, Any]], float]

    def solve(self) -> tuple[dict[str, Any], Match]:
        """The nearest size of the nearest width from which the target can be met. Raises ConfigError if none can."""
        tried: list[Size] = []
        for width in (*self._nearest_widths(), *self._between()):
            best = self.solved(width, tried)
            if abs(best.value / self.target - 1) <= TOLERANCE:
                written = self._written_sizes()
                changed = {key: (written[key], new) for key, new in best.chosen.items()}
                return best.model, Match(quantity=self.quantity, target=self.target, found=best.value, changed=changed)
        raise ConfigError(self._unreachable(tried))

    def sizes(self) -> Iterator[Size]:
        """The size of each width that is tried, nearest to the target first."""
        for width in (*self._nearest_widths(), *self._between()):
            yield self.solved(width, [])

    @cached_property
    def specs(self) -> dict[str, BlockSpec]:
        """The specs as written, defaults that depend on the width not yet filled in."""
        tables = self.arch.get("blocks") or {}
        found: dict[str, BlockSpec] = {}
        for letter in pattern.letters(pattern.expand(self.arch["pattern"])):
            spec, _ = options.read(spec_class(letter), tables.get(letter) or {}, letter)
            assert spec is not None, "resolve_model has read it"
            found[letter] = spec
        return found

    @cached_property
    def widths(self) -> list[int]:
        """Model widths that every block can have, ascending."""
        return [width for width in range(STEP, MAX_WIDTH + 1, STEP) if self._legal(width)]

    def _legal(self, width: int) -> bool:
        for spec in self.specs.values():
            heads = _same_heads(spec, self.arch["width"], width)
            if heads is None or replace(spec, **heads).problems(width, ""):
                return False
        return True

    def _between(self) -> Iterator[int]:
        """Widths between the two of `widths` around the target, at which heads change their own width; nearest first."""
        above = self._above
        low = self.widths[above - 1] if above else 0
        high = self.widths[above] if above < len(self.widths) else low
        legal = [
            width
            for width in range(low + STEP, high, STEP)
            if all(_heads(spec, self.arch["width"], width) is not None for spec in self.specs.values())
        ]
        yield from self._by_distance(legal)

    def _written_sizes(self) -> dict[str, int]:
        sizes = {"arch.width": self.arch["width"]}
        for letter, spec in self.specs.items():
            for key in (*spec.SCALED_HEADS, *spec.SCALED_WIDTHS):
                sizes[f"arch.blocks.{letter}.{key}"] = getattr(spec, key)
        return sizes

    def _at(self, width: int, factor: float, step: int) -> Size:
        """The model of that width, its inner widths at their ratio times the factor."""
        ratio = width / self.arch["width"]
        chosen = {"arch.width": width}
        tables = {letter: dict(table or {}) for letter, table in (self.arch.get("blocks") or {}).items()}
        for letter, spec in self.specs.items():
            changed = _heads(spec, self.arch["width"], width)
            assert changed is not None, "only legal widths are tried"
            for key in spec.SCALED_WIDTHS:
                size = getattr(spec, key)
                if size:  # 0: the block has no such part, and gets none
                    changed[key] = max(step, round(size * ratio * factor / step) * step)
            tables.setdefault(letter, {}).update(changed)
            chosen |= {f"arch.blocks.{letter}.{key}": size for key, size in changed.items()}
        model = resolve_model({**self.arch, "width": width, "blocks": tables}, self.vocab_size)
        return Size(model, chosen, self.measure(model))

    @cached_property
    def _above(self) -> int:
        """Which of `widths` is the first whose size is above the target."""
        low, high = 0, len(self.widths)
        while low < high:
            middle = (low + high) // 2
            if self._at(self.widths[middle], 1.0, STEP).value > self.target:
                high = middle
            else:
                low = middle + 1
        return low

    def _nearest_widths(self) -> list[int]:
        """Widths around the target, the one first whose own inner widths come nearest to it."""
        return self._by_distance(self.widths[max(0, self._above - NEIGHBOURS) : self._above + NEIGHBOURS])

    def _by_distance(self, widths: list[int]) -> list[int]:
        return sorted(widths, key=lambda width: abs(math.log(self._at(width, 1.0, STEP).value / self.target)))

    def solved(self, width: int, tried: list[Size]) -> Size:
        """The size of that width that is nearest to the target."""
        best = self._at(width, 1.0, STEP)
        tried.append(best)
        if not any(getattr(spec, key) for spec in self.specs.values() for key in spec.SCALED_WIDTHS):
            return best
        for step in (STEP, 1):
            for size in self._bisected(width, step):
                tried.append(size)
                if abs(size.value - self.target) < abs(best.value - self.target):
                    best = size
            if abs(best.value / self.target - 1) <= TOLERANCE:
                break
        return best

    def _bisected(self, width: int, step: int) -> Iterator[Size]:
        """The sizes below and above the target that differ least."""
        low, high = -math.log2(MAX_FACTOR), math.log2(MAX_FACTOR)
        below, above = self._at(width, 2**low, step), self._at(width, 2**high, step)
        while below.value < self.target < above.value and high - low > 1e-6:
            middle = (low + high) / 2
            size = self._at(width, 2**middle, step)
            if size.value <= self.target:
                low, below = middle, size
            else:
                high, above = middle, size
        yield below
        yield above

    def _unreachable(self, tried: list[Size]) -> str:
        below = max((size for size in tried if size.value <= self.target), key=lambda size: size.value, default=None)
        above = min((size for size in tried if size.value > self.target), key=lambda size: size.value, default=None)
        text = f"arch.match.{self.quantity} = {self.target:,}: no size of this architecture is within {TOLERANCE:.0%} of it."
        for size in (below, above):
            if size is not None:
                keys = ", ".join(f"{key}={value}" for key, value in size.chosen.items())
                text += f"\n  {size.value:,.0f} {_say(self.quantity)} ({size.value / self.target - 1:+.1%}): {keys}."
        legal = self.widths
        which = "Widths at which heads keep their own width" if self._has_heads else "Widths"
        steps = f"{which} go in steps of {legal[1] - legal[0]} here. " if len(legal) > 1 else ""
        return f"{text}\n  {steps}{self._advice(below is None)}"

    @property
    def _has_heads(self) -> bool:
        return any(spec.SCALED_HEADS or hasattr(spec, "head_dim") for spec in self.specs.values())

    def _advice(self, too_small: bool) -> str:
        if too_small:
            heads = ", smaller heads, which allow smaller widths," if self._has_heads else ""
            return f"Take fewer layers (arch.pattern){heads} or a smaller vocabulary: the smallest size is above the target."
        channel = any(spec.SCALED_WIDTHS for spec in self.specs.values())
        ways = ["another number of layers (arch.pattern)"]
        ways += ["smaller heads, which make the steps finer"] * self._has_heads
        ways += [] if channel else ["an MLP, whose width goes in finer steps"]
        return f"Take one of these sizes as the target, or {', or '.join(ways)}."


def _same_heads(spec: BlockSpec, width: int, wanted: int) -> dict[str, int] | None:
    """The counts of heads at the wanted width, each head as wide as it is; one head stays one. None if they do not divide."""
    counts = _counts(spec)
    if any(count * wanted % width for count in counts.values()):
        return None
    return {key: count * wanted // width for key, count in counts.items()}


def _heads(spec: BlockSpec, width: int, wanted: int) -> dict[str, int] | None:
    """The same, or else the legal counts nearest to the ratio of the widths; None if there are none within a factor of 2."""
    same = _same_heads(spec, width, wanted)
    if same is not None and not replace(spec, **same).problems(wanted, ""):
        return same
    ideal = {key: count * wanted / width for key, count in _counts(spec).items()}
    ranges = [range(max(1, math.ceil(count / 2)), math.floor(count * 2) + 1) for count in ideal.values()]
    found: tuple[float, dict[str, int]] | None = None
    for counts in itertools.product(*ranges):
        chosen = dict(zip(ideal, counts, strict=True))
        far = sum(abs(math.log(count / ideal[key])) for key, count in chosen.items())
        if (found is None or far < found[0]) and not replace(spec, **chosen).problems(wanted, ""):
            found = far, chosen
    return None if found is None else found[1]


def _counts(spec: BlockSpec) -> dict[str, int]:
    """The numbers of heads that change with the width."""
    written = {key: getattr(spec, key) for key in spec.SCALED_HEADS}
    return {key: count for key, count in written.items() if count is not None and count > 1}
