"""The layer string: '6*(5*m gm) 2*m' to a list of layers, without knowing what the letters mean.

    pattern   = item+                       items are separated by blanks
    item      = [INT '*'] (layer | '(' pattern ')')
    layer     = [LETTER] (LETTER | '(' LETTER ('|' LETTER)+ ')')

Two letters written together are one layer: the first one feeds the input of the second ("gm"). A group with
bars is one layer of parallel branches ("(a|m)"). A string of M * - E alone, without blanks, is Megatron's
hybrid notation (M Mamba2, * attention, - MLP, E mixture of experts) and is read as such.

Where layers are best said by their positions (from 0), a pattern is a table:

    pattern: {layers: 38, fill: m, at: {gm: [5, 11, 17, 23, 29, 35]}}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zexp.config.errors import ConfigError, Problems

MEGATRON = {"M": "m", "*": "a", "-": "d", "E": "e"}
MAX_LAYERS = 10_000  # far above any model; stops '99999999*m' before it fills the memory


def expand(pattern: str | Sequence[str] | Mapping[str, Any]) -> list[str]:
    """The layers of a pattern, in order; a list of patterns is read one after the other.

    Raises ConfigError with the character (counted from 1) at which the pattern stops making sense, or with every mistake
    of a table of positions.
    """
    if isinstance(pattern, Mapping):
        return _expand_positions(pattern)
    if isinstance(pattern, str):
        return _expand_text(pattern)
    if not isinstance(pattern, Sequence) or not all(isinstance(part, str) for part in pattern):
        raise ConfigError(f"arch.pattern = {pattern!r}: a pattern is a string or a list of strings.")
    if not pattern:
        raise ConfigError("arch.pattern = []: a model needs at least one layer.")
    return [layer for part in pattern for layer in _expand_text(part)]


def feeder(layer: str) -> str | None:
    """The letter that feeds this layer's input ("gm": g), or None."""
    head = layer[: layer.index("(")] if "(" in layer else layer[:-1]
    return head or None


def branches(layer: str) -> list[str]:
    """The letters whose outputs this layer adds to the residual ("gm": [m], "(a|m)": [a, m])."""
    return layer[layer.index("(") + 1 : -1].split("|") if "(" in layer else [layer[-1]]


def letters(layers: Iterable[str]) -> list[str]:
    """Every letter used, each once, in the order of first use."""
    return list(dict.fromkeys(char for layer in layers for char in layer if char.isalpha()))


def _expand_positions(table: Mapping[str, Any]) -> list[str]:
    problems = Problems()
    if unknown := [str(key) for key in table if key not in ("layers", "fill", "at")]:
        problems.add(f"arch.pattern: a table of positions has the keys layers, fill and at; found {', '.join(unknown)}.")
    count, at = table.get("layers"), table.get("at") or {}
    if type(count) is not int or not 1 <= count <= MAX_LAYERS:
        problems.add(f"arch.pattern.layers = {count!r}: the number of layers, 1 to {MAX_LAYERS}, is expected.")
        count = None
    if not isinstance(at, Mapping):
        problems.add(f"arch.pattern.at = {at!r}: a table of layers and their positions is expected, {{gm: [5, 11]}}.")
        at = {}
    fill = _one_layer(table.get("fill"), "arch.pattern.fill", problems)
    placed: dict[int, str] = {}
    for name, positions in at.items():
        where = f"arch.pattern.at.{name}"
        layer = _one_layer(name, where, problems)
        if not isinstance(positions, Sequence) or not all(type(position) is int for position in positions):
            problems.add(f"{where} = {positions!r}: a list of layer numbers from 0 is expected.")
            continue
        for position in positions:
            if position < 0 or (count is not None and position >= count):
                last = "" if count is None else f" to {count - 1}"
                problems.add(f"{where}: there is no layer {position}; layers are numbered 0{last}.")
            elif position in placed:
                other = f"in arch.pattern.at.{placed[position]}" if placed[position] != layer else "twice"
                problems.add(f"{where}: layer {position} also stands {other}. Position lists may not overlap.")
            elif layer is not None:
                placed[position] = layer
    problems.raise_if_any()
    assert count is not None and fill is not None
    return [placed.get(position, fill) for position in range(count)]


def _one_layer(text: Any, where: str, problems: Problems) -> str | None:
    try:
        layers = _expand_text(text) if isinstance(text, str) else []
    except ConfigError as error:
        problems.extend(error.problems)
        return None
    if len(layers) != 1:
        problems.add(f"{where} = {text!r}: one layer is expected, like m, gm or (a|m).")
        return None
    return layers[0]


def _expand_text(text: str) -> list[str]:
    if not text.strip():
        raise ConfigError(f"arch.pattern = {text!r}: the pattern is empty. Write for example '4*(a d)'.")
    if set(text) <= set(MEGATRON):
        return [MEGATRON[char] for char in text]
    return _Reader(text).read()


@dataclass
class _Group:
    """An open '(' : where it stands, how often it is repeated, what came before and inside it."""

    at: int
    times: int
    feeds: str
    layers: list[str] = field(default_factory=list)


@dataclass
class _Reader:
    text: str
    at: int = 0
    stack: list[_Group] = field(default_factory=list)

    def read(self) -> list[str]:
        self.stack = [_Group(at=-1, times=1, feeds="")]
        while self.at < len(self.text):
            char = self.text[self.at]
            if char.isspace():
                self.at += 1
            elif char == ")":
                self._close()
            else:
                self._item()
        if len(self.stack) > 1:
            raise self._error(
                self.stack[-1].at,
                "the '(' at character {} is never closed.",
                f"Close it: '{self.text.rstrip()}{')' * (len(self.stack) - 1)}'.",
            )
        return self.stack[0].layers

    def _item(self) -> None:
        start, times = self.at, self._repeat()
        if self.at < len(self.text) and self.text[self.at] == "(":
            self._open(times, feeds="")
            return
        end = self.at
        while end < len(self.text) and self.text[end].isalpha():
            end += 1
        word, at = self.text[self.at : end], self.at
        if not word:
            found = repr(self.text[at]) if at < len(self.text) else "the end"
            raise self._error(
                at,
                f"a letter or '(' is expected at character {{}}, found {found}.",
                "A layer is a letter (a), a fed layer (gm) or parallel branches ((a|m)).",
            )
        if not word.isascii() or not word.islower():
            raise self._error(
                at,
                f"'{word}' at character {{}} is not a layer: block letters are a to z.",
                "Megatron's notation (M*-E) may not be mixed with zexp's letters.",
            )
        self.at = end
        if end < len(self.text) and self.text[end] == "(":
            if len(word) > 1:
                raise self._too_many_feeders(word, at)
            if not self._parallel(end):
                raise self._error(
                    end,
                    "the '(' at character {} follows a letter but is not a set of parallel branches.",
                    f"Put a blank before it: '{self.text[:end]} {self.text[end:]}'.",
                )
            self._open(times, feeds=word)
            return
        if len(word) > 2:
            raise self._too_many_feeders(word, at)
        self._add([word], times, start)

    def _repeat(self) -> int:
        """Reads 'INT *' (possibly several), or nothing (1)."""
        times = 1
        while self.at < len(self.text) and self.text[self.at].isdigit():
            start = self.at
            while self.at < len(self.text) and self.text[self.at].isdigit():
                self.at += 1
            digits = self.text[start : self.at]
            self._skip_blanks()
            if self.at >= len(self.text) or self.text[self.at] != "*":
                raise self._error(
                    start,
                    f"the number {digits} at character {{}} repeats nothing.",
                    f"Write '{digits}*' before a layer or a group.",
                )
            self.at += 1
            self._skip_blanks()
            if len(digits) > len(str(MAX_LAYERS)):  # int() of thousands of digits is refused by Python itself
                raise self._error(start, f"at character {{}} the model passes {MAX_LAYERS} layers.", "Check the repeats.")
            if not digits.isascii() or int(digits) == 0:
                raise self._error(
                    start, f"the repeat {digits}* at character {{}} leaves no layer.", "Repeat at least once."
                )
            times *= int(digits)
            self._check_size(times, start)
        return times

    def _open(self, times: int, feeds: str) -> None:
        group = _Group(at=self.at, times=times, feeds=feeds)
        self.at += 1
        if self._parallel(group.at):
            self._branches(group)
        else:
            self.stack.append(group)

    def _parallel(self, opening: int) -> bool:
        """Whether the group that opens there has a bar of its own."""
        depth = 0
        for char in self.text[opening + 1 :]:
            depth += (char == "(") - (char == ")")
            if depth < 0:
                return False
            if char == "|" and depth == 0:
                return True
        return False

    def _branches(self, group: _Group) -> None:
        end = self.text.find(")", self.at)
        if end < 0:
            raise self._error(
                group.at, "the '(' at character {} is never closed.", f"Close it: '{self.text.rstrip()})'."
            )
        names, at = [], self.at
        for part in self.text[self.at : end].split("|"):
            name = part.strip()
            if len(name) != 1 or not name.isascii() or not name.islower():
                raise self._error(
                    at,
                    f"the branch '{name}' at character {{}} is not one block letter.",
                    "Parallel branches are single letters: '(a|m)'.",
                )
            names.append(name)
            at += len(part) + 1
        self.at = end + 1
        self._add([f"{group.feeds}({'|'.join(names)})"], group.times, group.at)

    def _close(self) -> None:
        if len(self.stack) == 1:
            raise self._error(
                self.at, "the ')' at character {} closes nothing.", "Remove it, or open a group before it."
            )
        group = self.stack.pop()
        if not group.layers:
            raise self._error(group.at, "the group at character {} is empty.", "Put layers into it or remove it.")
        self.at += 1
        self._add(group.layers, group.times, group.at)

    def _add(self, layers: list[str], times: int, at: int) -> None:
        self._check_size(times * len(layers) + len(self.stack[-1].layers), at)
        self.stack[-1].layers.extend(layers * times)

    def _skip_blanks(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def _check_size(self, layers: int, at: int) -> None:
        if layers > MAX_LAYERS:
            raise self._error(at, f"at character {{}} the model passes {MAX_LAYERS} layers.", "Check the repeats.")

    def _too_many_feeders(self, word: str, at: int) -> ConfigError:
        return self._error(
            at,
            f"'{word}' at character {{}} are {len(word)} letters in one layer; a layer has one feeding block at most.",
            f"Separate layers by blanks: '{' '.join(word)}'.",
        )

    def _error(self, at: int, problem: str, advice: str) -> ConfigError:
        return ConfigError(f"arch.pattern = {self.text!r}: {problem.format(at + 1)}\n  {advice}")
