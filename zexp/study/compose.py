"""The points of a study to composed configs: Hydra composes each set of group choices once, values are put on top.

Hydra takes a tenth of a second for a composition. Value overrides never change its defaults list, so two points with the
same choices differ only by what Hydra does last: applying the value overrides, one after the other. That is done here,
by Hydra's own function, on copies of the subtrees that an override touches; all others are shared and must not be
written to. Subtrees are independent of each other only while nothing interpolates: a point whose overrides hold an
interpolation, or reach into a subtree that does, gets a whole copy. What cannot be done so is composed by Hydra alone,
which also says what is wrong with a point that cannot be composed.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import env_override
from hydra.errors import HydraException
from omegaconf import Container, DictConfig, Node, OmegaConf, open_dict, read_write
from omegaconf._utils import split_key
from omegaconf.errors import OmegaConfBaseException

from zexp.config.schema import Run
from zexp.study.repository import remembering
from zexp.study.resolve import Composed
from zexp.study.typed import Parts, run_of


@dataclass
class _Choices:
    """Hydra's composition of group choices without values.

    whole: with Hydra's node; config: without; live: its keys whose subtrees interpolate; changed: subtrees with value
    overrides on top, by key and the overrides' texts; parts: the typed values of the subtrees that points share.
    """

    whole: DictConfig
    config: DictConfig
    live: frozenset[str]
    changed: dict[tuple[str, tuple[str, ...]], Node] = field(default_factory=dict)
    parts: Parts = field(default_factory=Parts)

    @property
    def names(self) -> dict[str, str | None]:
        return dict(self.whole.hydra.runtime.choices)


@dataclass(frozen=True)
class Composition:
    """One composed point. num: its hydra.job.num."""

    composed: Composed
    num: int
    _whole: DictConfig
    _parsed: Sequence[Override]

    @property
    def task_overrides(self) -> list[Override]:
        """The overrides that are not Hydra's own."""
        return [override for override in self._parsed if not override.is_hydra_override()]

    def run(self, parts: Parts | None = None, own: Collection[str] = ()) -> Run:
        """The typed Run, as run_of makes it, with this job's environment and `${hydra:...}`."""
        config = self.composed.config
        with env_override(dict(self._whole.hydra.job.env_set)):
            if not any(_reads_hydra(config._get_node(key)) for key in (own if parts is not None else config)):
                return run_of(config, parts, own)
            current = HydraConfig.instance().cfg
            try:
                HydraConfig.instance().set_config(self.whole())
                return run_of(config, parts, own)
            finally:
                HydraConfig.instance().cfg = current

    def whole(self) -> DictConfig:
        """The config with Hydra's node, as Hydra's own launcher makes it for this job; a copy."""
        shared = self._whole
        content = {
            key: copy.deepcopy(shared._get_node(key) if key == "hydra" else self.composed.config._get_node(key))
            for key in [*(k for k in shared if k == "hydra" or k in self.composed.config), *self.composed.config]
        }
        whole = _root(shared, content)
        task = self.task_overrides
        with read_write(whole.hydra), open_dict(whole.hydra):
            whole.hydra.overrides.task = [override.input_line for override in task]
            said = whole.hydra.job.config.override_dirname
            whole.hydra.job.override_dirname = get_overrides_dirname(
                overrides=task, kv_sep=said.kv_sep, item_sep=said.item_sep, exclude_keys=said.exclude_keys
            )
            whole.hydra.job.id = self.num
            whole.hydra.job.num = self.num
        return whole


class Composer:
    """Composes the points of one multirun.

    master: the config that Hydra gives to a launcher; hydra_compositions: how often Hydra was asked.
    """

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self.hydra_compositions = 0
        self._loader = remembering(loader)
        self._master = master
        said = OmegaConf.to_container(master.hydra.overrides.hydra)
        assert isinstance(said, list)
        _, self._repository = self._loader._parse_overrides_and_create_caching_repo(master.hydra.job.config_name, said)
        self._parser = OverridesParser.create()
        self._parsed: dict[str, Override] = {}
        self._groups: dict[str, bool] = {}
        self._choices: dict[tuple[str, ...], _Choices] = {}

    def compose(self, axes: dict[str, Any], overrides: Sequence[str], num: int) -> Composition:
        """A point's config. num: its hydra.job.num. Raises what Hydra raises for overrides that cannot be composed."""
        try:
            return self._on_top(axes, overrides, num)
        except (HydraException, OmegaConfBaseException):
            return self._by_hydra(axes, overrides, num)  # says what is wrong, with all overrides in place

    def _by_hydra(self, axes: dict[str, Any], overrides: Sequence[str], num: int) -> Composition:
        whole = self._load(overrides)
        config = _without_hydra(whole)
        choices = dict(whole.hydra.runtime.choices)
        composed = Composed(config, choices, axes, list(overrides), lambda: composition.run())
        composition = Composition(composed, num, whole, [self._parse(text) for text in overrides])
        return composition

    def _on_top(self, axes: dict[str, Any], overrides: Sequence[str], num: int) -> Composition:
        parsed = [self._parse(text) for text in overrides]
        values = [override for override in parsed if not self._is_choice(override)]
        choices = self._chosen([override for override in parsed if self._is_choice(override)])
        if any(override.is_sweep_override() for override in values):
            return self._by_hydra(axes, overrides, num)  # which refuses it
        if all(_stands_alone(override, choices) for override in values):
            config, own = _shared(choices, values)
        else:
            config = copy.deepcopy(choices.config)
            ConfigLoaderImpl._apply_overrides_to_config(values, config)
            own = frozenset(str(key) for key in config)
        composed = Composed(config, choices.names, axes, list(overrides), lambda: composition.run(choices.parts, own))
        composition = Composition(composed, num, choices.whole, parsed)
        return composition

    def _parse(self, text: str) -> Override:
        if text not in self._parsed:
            self._parsed[text] = self._parser.parse_override(text)
        return self._parsed[text]

    def _is_choice(self, override: Override) -> bool:
        """True for what can change the defaults list: choices of groups, and Hydra's own keys (its search path)."""
        key = override.key_or_group
        if override.is_hydra_override() or key == "hydra":
            return True
        if key not in self._groups:
            self._groups[key] = self._repository.group_exists(key)
        return self._groups[key] and not isinstance(override.value(), dict)

    def _chosen(self, overrides: Sequence[Override]) -> _Choices:
        texts = tuple(str(override.input_line) for override in overrides)
        if texts not in self._choices:
            whole = self._load(texts)
            config = _without_hydra(whole)
            live = frozenset(str(key) for key in config if _interpolates(config._get_node(key)))
            self._choices[texts] = _Choices(whole, config, live)
        return self._choices[texts]

    def _load(self, overrides: Sequence[str]) -> DictConfig:
        self.hydra_compositions += 1
        return self._loader.load_sweep_config(self._master, list(overrides))


def _stands_alone(override: Override, choices: _Choices) -> bool:
    """True if applying it reads and writes nothing but the subtree of its first key."""
    keys = split_key(override.key_or_group)
    node = choices.config._get_node(keys[0]) if keys[0] in choices.config else None
    if node is None or "${" in str(override.input_line) or (override.is_delete() and len(keys) == 1):
        return False
    return keys[0] not in choices.live or not isinstance(node, Container)


def _shared(choices: _Choices, values: Sequence[Override]) -> tuple[DictConfig, frozenset[str]]:
    """The choices' config with the values on top, and the keys of the nodes that are its own: those that interpolate."""
    by_key: dict[str, list[Override]] = {}
    for override in values:
        by_key.setdefault(split_key(override.key_or_group)[0], []).append(override)
    content: dict[Any, Any] = {}
    own = choices.live - set(by_key)
    for key in choices.config:
        node = choices.config._get_node(key)
        if key in by_key:
            texts = tuple(str(override.input_line) for override in by_key[str(key)])
            if (str(key), texts) not in choices.changed:
                alone = _root(choices.config, {key: copy.deepcopy(node)})
                ConfigLoaderImpl._apply_overrides_to_config(by_key[str(key)], alone)
                changed = alone._get_node(key)
                assert isinstance(changed, Node)
                choices.changed[str(key), texts] = changed
            content[key] = choices.changed[str(key), texts]
        else:
            content[key] = copy.deepcopy(node) if key in own else node
    return _root(choices.config, content, own), own


def _root(like: DictConfig, content: dict[Any, Any], own: Collection[Any] | None = None) -> DictConfig:
    """A root of the same type and flags over other nodes. own: the keys of those that it becomes the parent of; None = all.

    OmegaConf copies whatever is put into a config; not copying is the point here.
    """
    root = DictConfig(None)
    root.__dict__["_metadata"] = copy.deepcopy(like._metadata)
    root.__dict__["_content"] = content
    for key in content if own is None else own:
        content[key]._set_parent(root)
    return root


def _without_hydra(whole: DictConfig) -> DictConfig:
    """A root over the nodes of a whole config, which from then on is only read for Hydra's node and its order."""
    return _root(whole, {key: whole._get_node(key) for key in whole if key != "hydra"})


def _interpolates(node: Any) -> bool:
    if node._is_interpolation():
        return True
    content = node._content if isinstance(node, Container) else None
    if isinstance(content, dict):
        return any(_interpolates(child) for child in content.values())
    return isinstance(content, list) and any(_interpolates(child) for child in content)


def _reads_hydra(node: Any) -> bool:
    """True if something in it asks Hydra's resolver, which answers for the job that is current."""
    content = node._content if isinstance(node, Container) else None
    if isinstance(content, dict | list):
        return any(_reads_hydra(child) for child in (content.values() if isinstance(content, dict) else content))
    return "${hydra:" in str(node._value())
