"""What a family of `transformers` models is: a table of keys, an order of layers, and a list of tensors. No torch.

Whether a model fits is not said anywhere: its config.json is written and read back, and what differs does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any

from zexp.blocks import pattern
from zexp.blocks.base import BlockSpec
from zexp.blocks.resolve import Stack, resolve_model, specs_of, stack_of
from zexp.config.errors import ConfigError
from zexp.model.hf.entries import Config, Entry, Flat, Unreadable
from zexp.model.hf.pieces import Piece

NUMERICS = {"init.hf": 1}  # raised when a tensor of a checkpoint becomes another one of ours

# Keys that change training, speed or last bits, and no logits: a config.json neither holds them nor contradicts them.
FREE = frozenset(
    {
        "blocks.m.chunk",
        *(f"blocks.e.{key}" for key in ("aux_loss", "z_loss", "sinkhorn_iterations", "routing_group")),
    }
)
Layer = tuple[str, ...]  # one of their layers, as layers of ours


@dataclass(frozen=True)
class Parts:
    """A resolved model, taken apart."""

    model: Mapping[str, Any]

    @cached_property
    def specs(self) -> dict[str, Any]:
        return dict(specs_of(self.model))

    @cached_property
    def stack(self) -> Stack:
        return stack_of(self.model)

    @property
    def layers(self) -> list[str]:
        return list(self.model["pattern"])

    @property
    def letters(self) -> list[str]:
        return pattern.letters(self.layers)

    @property
    def width(self) -> int:
        return self.stack.width

    @property
    def vocab_size(self) -> int:
        return int(self.model["vocab_size"])

    @cached_property
    def flat(self) -> Flat:
        """Every key by its path, those with `absent` values and defaults included."""
        made: Flat = {"vocab_size": self.vocab_size}
        _flatten(self.stack, "", made)
        for letter, spec in self.specs.items():
            _flatten(spec, f"blocks.{letter}.", made)
        return made


def _flatten(node: Any, at: str, into: Flat) -> None:
    for field in fields(node):
        value = getattr(node, field.name)
        if field.name == "rope_scaling":  # all of it or nothing
            into[at + field.name] = None if value is None else {f.name: getattr(value, f.name) for f in fields(value)}
        elif is_dataclass(value):
            _flatten(value, f"{at}{field.name}.", into)
        else:
            into[at + field.name] = value


@dataclass(frozen=True)
class Family:
    """One class of `transformers`.

    unit: the layers of ours that make one of theirs, each as the choices that there are: (("m", "a"), ("d",)).
    layers: their layers -> keys of config.json; raises Unreadable where the config cannot say them.
    unlayers: the other way.
    tensors: the pieces of a model that fits.
    limits: what the class refuses besides, one text each. free: keys of ours that it does not contradict, beside FREE.
    ignored: regular expressions of names that checkpoints may hold and nobody reads.
    tolerated: path -> values of ours that are taken whatever config.json says there (with the reason at the family).
    """

    model_type: str
    class_name: str
    unit: tuple[tuple[str, ...], ...]
    entries: tuple[Entry, ...]
    layers: Callable[[Sequence[Layer]], dict[str, Any]]
    unlayers: Callable[[Config], list[Layer]]
    tensors: Callable[[Parts], Iterable[Piece]]
    limits: Callable[[Parts], list[str]] = lambda parts: []
    free: frozenset[str] = FREE
    ignored: tuple[str, ...] = ()
    tolerated: Mapping[str, tuple[Any, ...]] | None = None

    def reasons(self, model: Mapping[str, Any]) -> list[str]:
        """Why the class cannot hold the model; nothing if it can."""
        parts = Parts(model)
        if wrong := self.misplaced(parts):
            return [self._place(parts, wrong[0])]
        try:
            config = self.config(model)
        except Unreadable as error:
            return [f"arch.pattern: {error}"]
        back = Parts(self.resolved(config))
        return [
            f"arch.{path} = {said(value)}: a {self.class_name} cannot say that; it would have {said(back.flat[path])}."
            for path, value in parts.flat.items()
            if path not in self.free and value != back.flat[path]
        ] + self.limits(parts)

    def config(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of config.json that the architecture decides. Raises Unreadable for layers that it cannot say."""
        parts = Parts(model)
        made: dict[str, Any] = {"architectures": [self.class_name], "model_type": self.model_type}
        made |= self.layers(self._cut(parts.layers))
        for entry in self.entries:
            made |= entry.write(parts.flat)
        return made

    def arch(self, config: Config) -> dict[str, Any]:
        """The architecture that a config.json describes, as a config's `arch`. Raises Unreadable with every reason."""
        layers = [layer for theirs in self.unlayers(config) for layer in theirs]
        letters = pattern.letters(layers)
        flat: Flat = {}
        problems: list[str] = []
        for entry in self.entries:
            paths = entry.ours()
            if paths and not any(_belongs(path, letters) for path in paths):
                continue
            try:
                flat |= entry.read(config)
            except Unreadable as error:
                problems.append(str(error))
        if problems:
            raise Unreadable(" ".join(problems))
        made: dict[str, Any] = {"pattern": layers, "blocks": {letter: {} for letter in letters}}
        for path, value in flat.items():
            if _belongs(path, letters):
                _set(made, path, value)
        return made

    def resolved(self, config: Config) -> dict[str, Any]:
        """The model that a config.json describes. Raises Unreadable."""
        arch = self.arch(config)
        try:
            return resolve_model(arch, arch["vocab_size"])
        except ConfigError as error:
            raise Unreadable(str(error)) from error

    def differences(self, config: Config, model: Mapping[str, Any], where: str) -> list[str]:
        """The keys of a model that a config.json contradicts, one text each. where: what to call the file."""
        try:
            theirs = Parts(self.resolved(config))
        except Unreadable as error:
            return [f"{where} is no model that zexp can have: {error}"]
        ours = Parts(model)
        if ours.layers != theirs.layers:
            return [
                f"arch.pattern: {where} has {len(theirs.layers)} layers, {_brief(theirs.layers)}; "
                f"the pattern has {len(ours.layers)}, {_brief(ours.layers)}."
            ]
        keys = {path: entry.theirs for entry in self.entries for path in entry.ours()}
        found = self.limits(ours)
        for path, value in ours.flat.items():
            other = theirs.flat[path]
            if value == other or path in self.free or value in (self.tolerated or {}).get(path, ()):
                continue
            key = f"{keys[path]}: " if keys.get(path) else f"a {self.class_name} has "
            found.append(
                f"arch.{path} = {said(value)}, but {where} says {key}{said(other)}. Set arch.{path}={said(other)}."
            )
        return found

    def misplaced(self, parts: Parts) -> list[int]:
        """The layers that stand where the family has others; one behind the last for a repeat that breaks off."""
        size = len(self.unit)
        found = [index for index, layer in enumerate(parts.layers) if layer not in self.unit[index % size]]
        return found or ([len(parts.layers)] if len(parts.layers) % size else [])

    def _place(self, parts: Parts, index: int) -> str:
        wanted = " ".join(choices[0] if len(choices) == 1 else "/".join(choices) for choices in self.unit)
        if index == len(parts.layers):
            return f"arch.pattern: it ends within a repeat of '{wanted}', which a {self.class_name} is made of."
        layer, choices = parts.layers[index], self.unit[index % len(self.unit)]
        blocks = " and ".join(_name(parts.specs[letter]) for letter in pattern.letters([layer]))
        return (
            f"arch.pattern: layer {index} is '{layer}' ({blocks}); a {self.class_name} repeats '{wanted}' and has "
            f"{' or '.join(choices)} there."
        )

    def _cut(self, layers: Sequence[str]) -> list[Layer]:
        size = len(self.unit)
        return [tuple(layers[start : start + size]) for start in range(0, len(layers), size)]


def some_attention(parts: Parts) -> list[str]:
    """For hybrids whose pass asks a cache for its length, which an attention layer alone can tell (transformers 5.24)."""
    return (
        [] if "a" in parts.letters else ["arch.pattern: no layer is 'a', and this class runs with some attention only."]
    )


def counted(unit: Layer) -> tuple[Callable[[Sequence[Layer]], dict[str, Any]], Callable[[Config], list[Layer]]]:
    """layers and unlayers of a family whose layers are all alike: num_hidden_layers."""

    def layers(theirs: Sequence[Layer]) -> dict[str, Any]:
        return {"num_hidden_layers": len(theirs)}

    def unlayers(config: Config) -> list[Layer]:
        return [unit] * count(config)

    return layers, unlayers


def count(config: Config) -> int:
    """num_hidden_layers. Raises Unreadable."""
    number = config.get("num_hidden_layers")
    if type(number) is not int or number < 1:
        raise Unreadable(f"num_hidden_layers = {number!r}: a number of layers is expected.")
    return number


def said(value: Any) -> str:
    """A value as a config would have it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {said(one)}" for key, one in value.items()) + "}"
    return str(value)


def _belongs(path: str, letters: Sequence[str]) -> bool:
    """False for a key of a block that the model does not have."""
    return not path.startswith("blocks.") or path.split(".")[1] in letters


def _brief(layers: list[str]) -> str:
    """A pattern's beginning, for a message."""
    return " ".join(layers[:8]) + (" …" if len(layers) > 8 else "")


def _name(spec: BlockSpec) -> str:
    return spec.NAME


def _set(table: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
    table[last] = value
