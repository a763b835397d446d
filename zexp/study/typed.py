"""A composed config to the typed Run that everything else reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from functools import cached_property
from typing import Any

from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from zexp.config.errors import ConfigError
from zexp.config.keys import unknown_keys
from zexp.config.schema import Run


class Part:
    """The subtree of one root key, as far as it was looked at."""

    def __init__(self, config: DictConfig, key: str) -> None:
        self.node: Any = config._get_node(key)
        self._config = config
        self._key = key

    @cached_property
    def unknown(self) -> list[str]:
        """One text for each key that the schema does not have."""
        node = self.node
        plain = OmegaConf.to_container(node, resolve=False) if isinstance(node, Container) else node._value()
        return unknown_keys({self._key: plain}, Run)

    @cached_property
    def is_typed(self) -> bool:
        """True if each table in it is of the dataclass that the schema wants there."""
        return _is_typed(self.node)

    @cached_property
    def value(self) -> Any:
        """Its value with interpolations resolved and dataclasses made. Raises MissingMandatoryValue."""
        node = self.node._dereference_node()
        if node._is_missing():
            self._config._format_and_raise(
                key=self._key, value=None, cause=MissingMandatoryValue("Missing mandatory value: $FULL_KEY")
            )
        return OmegaConf.to_object(node) if isinstance(node, Container) else node._value()


# Parts of nodes that several configs share, by the node's identity; a part keeps its node alive.
Parts = dict[int, Part]


def run_of(config: DictConfig, parts: Parts | None = None, own: Collection[str] = ()) -> Run:
    """The typed Run of a composed config. Raises ConfigError naming unknown keys, and a key that has no value.

    parts: a memo for configs that share nodes; what is made of these is shared, too, and must not be written to.
    own: the keys whose nodes are this config's alone.
    """
    known = {} if parts is None else parts
    found: dict[str, Part] = {}
    for key in (str(key) for key in config):
        part = known.get(id(config._get_node(key)))
        if part is None:
            part = Part(config, key)
            if key not in own:
                known[id(part.node)] = part
        found[key] = part
    if unknown := [text for part in found.values() for text in part.unknown]:
        raise ConfigError(unknown)
    try:
        if OmegaConf.get_type(config) is Run and all(part.is_typed for part in found.values()):
            return Run(**{key: part.value for key, part in found.items()})
        run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Run), config))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key or 'a key'} has no value. Set it.") from error
    assert isinstance(run, Run)
    return run


def _is_typed(node: Any) -> bool:
    if not isinstance(node, DictConfig | ListConfig):
        return True
    if node._is_none() or node._is_missing():
        return True
    wanted = node._metadata.ref_type
    if node._is_interpolation() or (dataclasses.is_dataclass(wanted) and node._metadata.object_type is not wanted):
        return False
    content: Any = node._content
    return all(_is_typed(child) for child in (content.values() if isinstance(content, dict) else content))
