"""In which keys two semantic blocks differ, and which of many blocks differs in the fewest. Pure.

A *leaf* is a dotted path to a value: `optim.weight_decay`, `lr[1].start`. A list of plain values (a pattern, betas) is one
leaf. The *key* of a leaf is its path up to the first list: all pieces of a schedule are the one key `lr`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "absent"})()


@dataclass(frozen=True)
class Difference:
    """A leaf that is not the same in two blocks; ABSENT where one has none."""

    leaf: str
    a: Any
    b: Any

    @property
    def key(self) -> str:
        return key_of(self.leaf)

    def to_json(self) -> dict[str, Any]:
        """A side that has no such key is left out: null is a value."""
        sides = {name: value for name, value in (("a", self.a), ("b", self.b)) if value is not ABSENT}
        return {"key": self.leaf, **sides}


def key_of(leaf: str) -> str:
    return leaf.partition("[")[0]


def leaves(block: Mapping[str, Any]) -> dict[str, Any]:
    """Every leaf of a semantic block with its value, in the block's order."""
    return dict(_leaves(block, ""))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """The leaves in which two blocks differ, in the order of a, then those that b alone has."""
    mine, other = leaves(a), leaves(b)
    found = [Difference(leaf, value, other.get(leaf, ABSENT)) for leaf, value in mine.items()]
    found += [Difference(leaf, ABSENT, value) for leaf, value in other.items() if leaf not in mine]
    return [one for one in found if not _same(one.a, one.b)]


def _same(a: Any, b: Any) -> bool:
    """Equal as an id has it: 1 is not 1.0, and True is neither."""
    return _value(a) == _value(b)


def _value(value: Any) -> Any:
    """Something hashable that is equal for equal values only."""
    return tuple(map(_value, value)) if isinstance(value, list) else (type(value).__name__, str(value))


@dataclass
class Blocks:
    """Semantic blocks by name, to be asked which of them differ from another in few keys.

    A set of blocks is an int with a bit each: all of them are compared with a block by one operation a key, so that 1,000
    stages find their nearest among 2,000 folders in a fraction of a second.
    """

    names: list[str] = field(default_factory=list)
    _having: dict[str, int] = field(default_factory=dict)  # key -> the blocks that have it
    _equal: dict[tuple[str, Any], int] = field(default_factory=dict)  # key with its values -> the blocks in which it is so

    @classmethod
    def of(cls, blocks: Mapping[str, Mapping[str, Any]]) -> Blocks:
        made = cls()
        having: dict[str, list[int]] = {}
        equal: dict[tuple[str, Any], list[int]] = {}
        for number, (name, block) in enumerate(blocks.items()):
            made.names.append(name)
            for key, value in _by_key(block).items():
                having.setdefault(key, []).append(number)
                equal.setdefault((key, value), []).append(number)
        made._having = {key: _bits(numbers) for key, numbers in having.items()}
        made._equal = {pair: _bits(numbers) for pair, numbers in equal.items()}
        return made

    def set_of(self, names: Collection[str]) -> int:
        """The set of the blocks with these names, for `without`."""
        return _bits([number for number, name in enumerate(self.names) if name in names])

    def near(self, block: Mapping[str, Any], most: int, *, anchors: Sequence[str] = (), without: int = 0) -> Iterator[str]:
        """Names of the blocks that differ in at most `most` keys, those that differ in fewest first.

        anchors: keys in which they do not differ. without: a set that is left out.
        """
        everything = (1 << len(self.names)) - 1
        exactly = [everything & ~without] + [0] * most  # n -> the blocks that differ in n of the keys looked at
        own = _by_key(block)
        for key in {*own, *self._having}:
            # A key that neither has is no difference.
            same = self._equal.get((key, own[key]), 0) if key in own else everything & ~self._having[key]
            if same == everything:
                continue
            if key in anchors:
                exactly = [blocks & same for blocks in exactly]
            else:
                exactly = [(exactly[n] & same) | (exactly[n - 1] & ~same if n else 0) for n in range(most + 1)]
            if not any(exactly):
                return
        for blocks in exactly:
            for number in _numbers(blocks):
                yield self.names[number]


def _by_key(block: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> all its leaves with their values, hashable."""
    found: dict[str, list[Any]] = {}
    for leaf, value in leaves(block).items():
        found.setdefault(key_of(leaf), []).append((leaf, _value(value)))
    return {key: tuple(parts) for key, parts in found.items()}


def _bits(numbers: list[int]) -> int:
    """The set of these numbers, which ascend."""
    if not numbers:
        return 0
    raw = bytearray(numbers[-1] // 8 + 1)
    for number in numbers:
        raw[number // 8] |= 1 << (number % 8)
    return int.from_bytes(raw, "little")


def _numbers(bits: int) -> Iterator[int]:
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


def say(value: Any) -> str:
    """A value for people: long ids cut, whole numbers with commas."""
    if value is ABSENT:
        return "absent"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return "[" + ", ".join(map(say, value)) + "]"
    text = str(value)
    return f"{text[:16]}…" if len(text) == 64 and set(text) <= set("0123456789abcdef") else text
