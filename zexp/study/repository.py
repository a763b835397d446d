"""Hydra's config repository with a memory: a YAML file that many compositions read is parsed once."""

from __future__ import annotations

import copy
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.config_source import ConfigResult


class RememberingRepository(ConfigRepository):
    """Hands out copies of what it has loaded. Hydra copies its repository for each composition: the copies share the memory.

    Results are kept by search path: `hydra.searchpath` gives a copy other sources.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        self._memory: dict[tuple[tuple[str, ...], str], ConfigResult | None] = {}
        super().__init__(config_search_path)

    def __deepcopy__(self, memo: dict[int, Any]) -> RememberingRepository:
        other = copy.copy(self)
        other.sources = copy.deepcopy(self.sources, memo)
        return other

    def load_config(self, config_path: str) -> ConfigResult | None:
        key = (tuple(f"{source.scheme()}://{source.path}" for source in self.sources), config_path)
        if key not in self._memory:
            self._memory[key] = super().load_config(config_path)
        return copy.deepcopy(self._memory[key])


def remembering(loader: ConfigLoader) -> ConfigLoaderImpl:
    """A loader of the same configs that reads each file once."""
    path = loader.get_search_path()
    other = ConfigLoaderImpl(config_search_path=path)
    other.repository = RememberingRepository(path)
    return other
