"""Composition on top of shared choices is Hydra's own, node by node; and Hydra is asked once for each set of choices."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from omegaconf import Container, DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from zexp.config.errors import ConfigError
from zexp.config.places import conf_dir
from zexp.config.schema import Run
from zexp.study.compose import Composer
from zexp.study.typed import run_of

SWEEPS = """# @package _global_
defaults:
  - override /arch: zamba2_${scale}
  - override /mix: high_quality
study: {name: mine, grid: {arch: [a, b]}}
anneal: {peak_fraction: 0.5}
eval: {limit: "${seed}"}
precision: ${oc.env:NOWHERE,fp32}
"""

LISTS = """# @package _global_
study: {scales: {one: [bpb, cloze]}}
eval: {tasks: "${study.scales.one}"}
"""


class Loader:
    """Hydra's loader over zexp's conf with a sweep file of the test's own, and the config of a multirun."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        ConfigStore.instance().store(name="schema", node=Run)
        (folder / "sweeps").mkdir(exist_ok=True)
        (folder / "sweeps" / "composed_mine.yaml").write_text(SWEEPS)
        (folder / "sweeps" / "composed_lists.yaml").write_text(LISTS)
        GlobalHydra.instance().clear()
        initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="zexp")
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        said = [f"hydra.searchpath=[file://{folder}]", *overrides]
        self.loader = hydra.config_loader
        self.master = self.loader.load_configuration("config", said, RunMode.MULTIRUN)

    def hydras(self, overrides: list[str], num: int) -> DictConfig:
        """As BasicLauncher composes it."""
        config = self.loader.load_sweep_config(self.master, overrides)
        with open_dict(config):
            config.hydra.job.id = num
            config.hydra.job.num = num
        return config


@pytest.fixture(scope="module")
def hydra(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    yield Loader(tmp_path_factory.mktemp("conf"))
    GlobalHydra.instance().clear()


def facts(node: Any) -> Any:
    """Everything that one can see of a node: its types, flags, value and children, in order."""
    meta = node._metadata
    content = node._content if isinstance(node, Container) else node._value()
    if isinstance(node, DictConfig) and isinstance(content, dict):
        content = [(key, facts(child)) for key, child in content.items()]
    elif isinstance(node, ListConfig) and isinstance(content, list):
        content = [facts(child) for child in content]
    return type(node), meta.ref_type, meta.object_type, meta.optional, meta.key, meta.flags, content


def without_hydra(config: DictConfig) -> DictConfig:
    config = copy.deepcopy(config)
    with open_dict(config):
        del config["hydra"]
    return config


def typed_or_error(make: Any) -> Any:
    try:
        return make()
    except (ConfigError, OmegaConfBaseException) as error:
        return type(error), str(error)


CHOICES = [
    "arch=zamba2_tiny", "arch=mamba2_tiny", "arch=zamba2_10m", "anneal=control", "anneal=replay60", "anneal=none", "scale=smoke", "+sweeps=composed_lists",
    "mix@anneal.mix=base", "mix=high_quality", "schedule=cosine", "+sweeps=composed_mine", "~logger", "~mix@anneal.mix", "eval=none",
    "mix@phases.pretrain.mix=base", "+mix@phases.pretrain.mix=base", "arch=[zamba2_tiny]", "arch=none_such", "arch=null",
    "hydra.job.env_set={ZEXP_STORE:elsewhere}", "hydra.job.config.override_dirname.exclude_keys=[seed]",
]  # fmt: skip
VALUES = [
    "seed=1", "seed=2", "seed=x", "anneal.peak_fraction=0.5", "anneal.peak_fraction=1e-1", "anneal.tokens=10M", "anneal.mix=null",
    "anneal.mix.sources.high_quality.weight=3", "mix.sources.base.weight=2", "+mix.sources={high_quality:{weight:1}}",
    "+mix.sources.high_quality.weight=1", "++mix.sources.base.max_epochs=9", "~mix.sources.base", "~corpus.sources.high_quality",
    "+phases={cool:{tokens:10K,parent:pretrain}}", "phases.pretrain.tokens=${anneal.tokens}", "phases.pretrain.mix.sources={}",
    "phases.pretrain.batch_tokens=${seed}", "store=elsewhere", "+store=elsewhere", "++store=elsewhere", "store=s_${scale}", "~seed",
    "precision=bf16", "optim.betas=[0.9,0.99]", "optim.betas=[0.9]", "+no_such_key=1", "no.such.key=1", "arch.pattern='a d,a'",
    "arch.blocks.m.expand=3", "+arch.blocks.m.new=1", "arch={width:64}", "arch={pattern:[a,d],width:64}", "eval.tasks=[bpb]",
    "eval.limit=3", "eval.batch_size=3", "eval.tasks.0=recall", "study.scales.one=[cloze]", "mix={sources:{base:{weight:7}}}", "study.name=hello", "study.grid={}", "logger.project=null", "optim=1",
    "logger.project=${hydra:job.num}", "anneal={tokens:5}", "++anneal={tokens:5}", "anneal.replay.fraction=???", "seed=1,2",
    "corpus.sources.base.kind=${precision}", "init.from_hf='a, b'", "schedule.decay=???", "seed=", "a b",
]  # fmt: skip


@settings(max_examples=60, phases=(Phase.explicit, Phase.generate))  # lists this short need no shrinking, which takes minutes
@given(
    st.lists(
        st.lists(st.sampled_from(CHOICES), max_size=3).flatmap(
            lambda choices: st.lists(st.sampled_from(VALUES), max_size=4).flatmap(lambda v: st.permutations([*choices, *v]))
        ),
        min_size=1, max_size=3,
    )
)  # fmt: skip
@example([["+sweeps=composed_mine", "seed=1"], ["+sweeps=composed_mine", "seed=2"], ["+sweeps=composed_mine"]])
@example([["+sweeps=composed_mine", "seed=1", "eval.batch_size=3"], ["+sweeps=composed_mine", "seed=2", "eval.batch_size=3"]])
@example([["+sweeps=composed_lists", "eval.tasks.0=recall"], ["+sweeps=composed_lists", "eval.batch_size=3", "study.scales.one=[]"]])
@example([["+sweeps=composed_mine", "scale=tiny", "seed=1"], ["+sweeps=composed_mine", "scale=tiny", "precision=bf16", "seed=1"]])
@example([["logger.project=${hydra:job.num}", "seed=1"], ["logger.project=${hydra:job.num}", "seed=2"]])
@example([["anneal=none", "++anneal={tokens:5}"], ["anneal=none", "anneal={tokens:5}", "anneal.tokens=6"]])
@example([["mix.sources.base.weight=2", "mix.sources.base.weight=3"], ["mix.sources.base.weight=2"], ["mix=high_quality"]])
@example([["hydra.job.env_set={ZEXP_STORE:elsewhere}", "seed=1"], ["seed=1"]])
def test_a_point_is_what_hydra_composes(hydra, points):
    composer = Composer(hydra.loader, hydra.master)
    for num, overrides in enumerate(points):
        try:
            expected = hydra.hydras(overrides, num)
        except Exception as error:
            with pytest.raises(type(error)) as caught:
                composer.compose({}, overrides, num)
            assert str(caught.value) == str(error)
            continue
        made = composer.compose({}, overrides, num)
        assert facts(made.whole()) == facts(expected)
        assert facts(made.composed.config) == facts(without_hydra(expected))
        assert made.composed.choices == dict(expected.hydra.runtime.choices)
        assert typed_or_error(made.composed.run) == typed_or_error(lambda config=expected: as_in_a_job(config))


def as_in_a_job(config: DictConfig) -> Run:
    """The long way: every key merged into the schema, under the environment and HydraConfig of the job."""
    before = HydraConfig.instance().cfg
    with pytest.MonkeyPatch.context() as patch:
        for key, value in config.hydra.job.env_set.items():
            patch.setenv(key, value)
        try:
            job = without_hydra(config)
            HydraConfig.instance().set_config(config)
            run_of(job)  # for its errors' texts
            run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Run), job))
        finally:
            HydraConfig.instance().cfg = before
    assert isinstance(run, Run)
    return run


def test_hydra_is_asked_once_for_each_set_of_choices(hydra):
    composer = Composer(hydra.loader, hydra.master)
    points = [
        [f"arch={arch}", f"anneal={anneal}", f"anneal.peak_fraction={peak}", f"seed={seed}"]
        for arch in ("zamba2_tiny", "mamba2_tiny")
        for anneal in ("control", "replay60")
        for peak in (0.25, 0.5, 0.75)
        for seed in range(5)
    ]
    made = [composer.compose({}, overrides, num).composed.run() for num, overrides in enumerate(points)]
    assert composer.hydra_compositions == 4
    assert [(run.seed, run.anneal and run.anneal.peak_fraction) for run in made[:6]] == [*((n, 0.25) for n in range(5)), (0, 0.5)]
    assert made[0].corpus is made[1].corpus, "what no override touches is made once"


def test_a_config_that_is_handed_on_does_not_share_nodes_with_the_others(hydra):
    composer = Composer(hydra.loader, hydra.master)
    one, other = (composer.compose({}, [f"seed={n}"], n) for n in range(2))
    whole = one.whole()
    whole.optim.weight_decay = 0.5
    assert other.composed.config.optim.weight_decay == one.composed.config.optim.weight_decay == 0.1


def test_a_sweep_file_with_interpolations_composes(hydra):
    config = hydra.hydras(["+sweeps=composed_mine", "scale=tiny", "seed=7"], 0)
    assert (config.arch.width, config.eval.limit) == (128, 7)
    assert hydra.hydras(["+sweeps=composed_lists"], 0).eval.tasks == ["bpb", "cloze"]


def test_errors_are_hydras(hydra):
    with pytest.raises(HydraException, match=r"Could not override .anneal\.peek."):
        Composer(hydra.loader, hydra.master).compose({}, ["anneal.peek=1", "seed=1"], 0)
