"""Composed runs for tests: conf/ through Hydra's compose API, typed."""

from __future__ import annotations

from functools import cache

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from zexp.config.places import conf_dir
from zexp.config.schema import Run
from zexp.study.typed import run_of


@cache
def config(*overrides: str) -> DictConfig:
    ConfigStore.instance().store(name="schema", node=Run)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def run(*overrides: str) -> Run:
    return run_of(config(*overrides))
