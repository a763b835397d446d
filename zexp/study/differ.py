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
    found: dict[str, Any] = {}
    _collect(block, "", found)
    return found


def _collect(value: Any, path: str, found: dict[str, Any]) -> None:
    # Blocks are of plain types: a plan looks into thousands, and isinstance would double its time.
    kind = type(value)
    if kind is dict and value:
        for key, item in value.items():
            _collect(item, f"{path}.{key}" if path else key, found)
    elif kind is list and any(type(item) in (dict, list) for item in value):
        for index, item in enumerate(value):
            _collect(item, f"{path}[{index}]", found)
    else:
        found[path] = value


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """The leaves in which two blocks differ, in the order of a, then those that b alone has."""
    return between(leaves(a), leaves(b))


def between(mine: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    """The same of two blocks' leaves."""
    found = [Difference(leaf, value, other.get(leaf, ABSENT)) for leaf, value in mine.items() if not _has(other, leaf, value)]
    return found + [Difference(leaf, ABSENT, value) for leaf, value in other.items() if leaf not in mine]


def _has(block: Mapping[str, Any], leaf: str, value: Any) -> bool:
    """Whether a leaf is there with an equal value, as an id has it: 1 is not 1.0, and True is neither."""
    return leaf in block and _value(block[leaf]) == _value(value)


def _value(value: Any) -> Any:
    """Something hashable that is equal for equal values only."""
    kind = type(value)
    if kind is str:
        return value
    if kind is list:
        return tuple(map(_value, value))
    return (kind, None if kind is dict else value)  # a table that is a leaf is empty


@dataclass
class Blocks:
    """Semantic blocks by name, to be asked which of them differ from another in few keys.

    A set of blocks is an int with a bit each: all of them are compared with a block by one operation a key, so that 1,000
    stages find their nearest among 2,000 folders in a fraction of a second.
    """

    leaves: dict[str, dict[str, Any]] = field(default_factory=dict)  # by the block's name
    _having: dict[str, int] = field(default_factory=dict)  # key -> the blocks that have it
    _equal: dict[tuple[str, Any], int] = field(default_factory=dict)  # key with its values -> the blocks in which it is so

    @classmethod
    def of(cls, blocks: Mapping[str, Mapping[str, Any]]) -> Blocks:
        made = cls({name: leaves(block) for name, block in blocks.items()})
        having: dict[str, list[int]] = {}
        equal: dict[tuple[str, Any], list[int]] = {}
        for number, own in enumerate(made.leaves.values()):
            for key, value in _by_key(own).items():
                having.setdefault(key, []).append(number)
                equal.setdefault((key, value), []).append(number)
        made._having = {key: _bits(numbers) for key, numbers in having.items()}
        made._equal = {pair: _bits(numbers) for pair, numbers in equal.items()}
        return made

    def __post_init__(self) -> None:
        self._names = list(self.leaves)

    def set_of(self, names: Collection[str]) -> int:
        """The set of the blocks with these names, for `without`."""
        return _bits([number for number, name in enumerate(self._names) if name in names])

    def near(self, own: Mapping[str, Any], most: int, *, anchors: Sequence[str] = (), without: int = 0) -> Iterator[str]:
        """Names of the blocks that differ in at most `most` keys from one with these leaves, those of fewest first.

        anchors: keys in which they do not differ. without: a set that is left out.
        """
        everything = (1 << len(self._names)) - 1
        exactly = [everything & ~without]  # n -> the blocks that differ in n of the keys looked at
        mine = _by_key(own)
        for key in (*mine, *(key for key in self._having if key not in mine)):
            # A key that neither has is no difference.
            same = self._equal.get((key, mine[key]), 0) if key in mine else everything & ~self._having[key]
            if same == everything:
                continue
            if key in anchors:
                exactly = [blocks & same for blocks in exactly]
            else:
                moved = [blocks & ~same for blocks in exactly]
                exactly = [stay & same | more for stay, more in zip([*exactly, 0], [0, *moved], strict=True)][: most + 1]
            if not any(exactly):
                return
        for blocks in exactly:
            for number in _numbers(blocks):
                yield self._names[number]


def _by_key(own: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> all its leaves with their values, hashable."""
    found: dict[str, Any] = {}
    lists: dict[str, list[Any]] = {}
    for leaf, value in own.items():
        if "[" in leaf:
            lists.setdefault(key_of(leaf), []).append((leaf, _value(value)))
        else:
            found[leaf] = _value(value)
    return found | {key: tuple(parts) for key, parts in lists.items()}


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
