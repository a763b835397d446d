"""Every shipped architecture: parameters as published, and those of the module that is built; FLOPs and caches."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.composed import config
from tests.test_cli import zexp
from zexp.blocks import pattern
from zexp.blocks.base import FeederSpec
from zexp.blocks.resolve import resolve_model, specs_of
from zexp.calc.model import counted
from zexp.config.identity import semantic_dict
from zexp.config.places import conf_dir
from zexp.kernels.retention import torch_backend as retention
from zexp.kernels.rotary import torch_backend as rotary
from zexp.model.build import build
from zexp.model.language_model import LanguageModel
from zexp.study.describe import describe
from zexp.study.resolve import Composed, run_of

# Published models: all parameters, and those that one token is computed with where that is fewer. Counts of the weights of
# the checkpoints named in conf/arch, without adapters that no call uses.
PUBLISHED = {
    "zamba_7b": (7_232_490_496, None),
    "zamba2_1p2b": (1_215_064_704, None),
    "zamba2_2p7b": (2_662_214_560, None),
    "zamba2_7b": (7_356_749_648, None),
    "blackmamba_1p5b": (1_458_462_072, 343_694_712),
    "blackmamba_2p8b": (2_783_213_584, 628_770_832),
    "mamba_130m": (129_135_360, None),
    "mamba_370m": (371_516_416, None),
    "mamba_790m": (793_204_224, None),
    "mamba_1p4b": (1_372_178_432, None),
    "mamba_2p8b": (2_768_345_600, None),
    "mamba2_130m": (128_989_632, None),
    "mamba2_370m": (368_346_624, None),
    "mamba2_780m": (780_161_280, None),
    "mamba2_1p3b": (1_343_757_312, None),
    "mamba2_2p7b": (2_702_599_680, None),
    "jamba_v0p1": (51_570_323_328, 12_110_311_296),
    "pythia_160m": (162_322_944, None),
    "pythia_410m": (405_334_016, None),
    "pythia_1b": (1_011_781_632, None),
    "pythia_1p4b": (1_414_647_808, None),
    "pythia_2p8b": (2_775_208_960, None),
    "llama3p2_1b": (1_235_814_400, None),
    "rwkv7_168m": (167_638_272, None),
    "retnet_380m": (380_171_264, None),
    "retnet_1p3b": (1_351_727_104, None),
    "mixtral_8x7b": (46_702_792_704, None),
    "xlstm_7b": (6_865_424_896, None),
    "lfm2_1p2b": (1_170_340_608, None),
    "nemotron_h_8b": (8_100_852_736, None),
}
UNCOUNTED = {"nvidia_hybrid_8b", "qwen3_next_style"}  # of which no checkpoint is published in this form
SMALL = {"tiny": 1_310_000, "10m": 10_000_000, "50m": 50_000_000}  # at a vocabulary of 4096

# Bytes that a token of context adds in bf16; every call of a shared block has a cache of its own.
KV_BYTES = {
    "zamba_7b": 386_048, "zamba2_1p2b": 98_304, "zamba2_2p7b": 184_320, "zamba2_7b": 372_736, "llama3p2_1b": 32_768,
    "jamba_v0p1": 16_384,
}  # fmt: skip

PRESETS = sorted(path.stem for path in (conf_dir() / "arch").glob("*.yaml"))


@cache
def described(name: str, *overrides: str) -> dict[str, Any]:
    """What `zexp calc` says of it."""
    (answer,) = describe([Composed(config(f"arch={name}", *overrides), {"arch": name}, {}, [])])
    return answer


@cache
def resolved(name: str) -> dict[str, Any]:
    run = run_of(config(f"arch={name}"))
    return resolve_model(semantic_dict(run.arch), run.corpus.tokenizer.vocab_size)


def letters(name: str) -> set[str]:
    written = yaml.safe_load((conf_dir() / f"arch/{name}.yaml").read_text())["pattern"]
    return set(pattern.letters(pattern.expand(written)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name):
    total, active = PUBLISHED[name]
    counts = described(name)["parameters"]
    assert counts["total"] == total
    if active is not None:
        assert counts["active"] == active


def test_every_preset_is_counted_here():
    assert {name for name in PRESETS if name.rpartition("_")[2] not in SMALL} == PUBLISHED.keys() | UNCOUNTED


@pytest.mark.parametrize("name", [name for name in PRESETS if name.rpartition("_")[2] in SMALL])
def test_small_presets_are_of_one_size_class(name):
    answer = described(name)
    assert answer["vocab_size"] == 4096
    size = name.rpartition("_")[2]
    within = 0.015 if size == "tiny" else 0.01  # mamba2_tiny has seven layers, and no width in finer steps
    assert answer["parameters"]["total"] == pytest.approx(SMALL[size], rel=within)


@pytest.mark.parametrize("name", PRESETS)
def test_the_module_has_the_parameters_that_are_counted(name):
    built = build(resolved(name), seed=None, device="meta")
    assert described(name)["parameters"]["total"] == sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.parametrize("name", ["zamba2_1p2b", "jamba_v0p1", "llama3p2_1b"])
def test_the_command_prints_the_same_as_one_object(name, tmp_path):
    done = zexp("calc", "--json", f"arch={name}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(described(name)))


@pytest.mark.parametrize("name", KV_BYTES)
def test_a_token_of_context_takes_as_many_bytes(name):
    assert described(name)["memory"]["inference"]["kv_bytes_per_token"] == KV_BYTES[name]


def test_zamba2_1p2b_costs_so_many_flops():
    flops = described("zamba2_1p2b", "seq_len=4096")["flops_per_token"]
    assert flops["forward"] == pytest.approx(3.883e9, abs=0.5e6)
    assert flops["train"] == 3 * flops["forward"] == pytest.approx(11.65e9, abs=5e6)
    assert flops["train_recomputed"] == 4 * flops["forward"]


def products(model: dict[str, Any], tokens: int) -> float:
    """FLOPs a token of aten.mm and addmm in a forward pass with logits, as torch counts them, without computing it."""
    _forget_tables()
    with FakeTensorMode(), torch.no_grad():  # a CPU without memory; on the device meta there is no autocast to switch off
        built = LanguageModel(model)
        with FlopCounterMode(display=False) as counter:
            built.logits(built(torch.zeros(1, tokens, dtype=torch.long)))
    _forget_tables()
    counts = counter.get_flop_counts()["Global"]
    return (counts.get(torch.ops.aten.mm, 0) + counts.get(torch.ops.aten.addmm, 0)) / tokens


def _forget_tables() -> None:
    """Tables that operations keep: none of a fake mode may get into another, or into a real model."""
    for table in (rotary._table, retention._tables):
        table.cache_clear()


def matmul_flops(model: dict[str, Any]) -> float:
    """The part of calc's FLOPs that is products with weight matrices."""
    width = model["width"]
    blocks = sum(counted(model, letter) * spec.matmul_flops(width) for letter, spec in specs_of(model).items())
    return blocks + 2 * width * model["vocab_size"]


def test_zamba2_1p2b_multiplies_exactly_what_transformers_does():
    # transformers' model at 4096 tokens under FlopCounterMode: 3518.496768 MFLOP a token of aten.mm.
    model = resolved("zamba2_1p2b")
    assert matmul_flops(model) == products(model, tokens=16) == 3_518_496_768


# Experts are counted in tests/blocks/test_contract.py: which of them compute depends on data, which meta tensors have not.
# RWKV-7's first layer lacks one pair of narrow matrices that calc counts for every layer.
@pytest.mark.parametrize(
    "name", [name for name in PRESETS if name in PUBLISHED and not letters(name) & {"e", "k"}]
)
def test_products_with_weights_are_those_that_torch_counts(name):
    model = resolved(name)
    assert matmul_flops(model) == products(model, tokens=16)


@pytest.mark.parametrize("name", PRESETS)
def test_a_token_costs_no_less_with_more_context(name):
    rows = described(name)["memory"]["inference"]["contexts"]
    grows = any(spec.kv_bytes_per_token(1, 1) for spec in specs_of(resolved(name)).values())
    for before, after in pairwise(rows):
        assert (after["flops"] > before["flops"]) == grows
        assert (after["cache"] > before["cache"]) or not grows


@pytest.mark.parametrize("name", PRESETS)
def test_a_device_alone_holds_all_parameters_and_blocks_say_what_they_share(name):
    model = resolved(name)
    width = model["width"]
    for spec in specs_of(model).values():
        assert spec.tensor_parameters(width, 1) == spec.parameters(width)
        assert not isinstance(spec, FeederSpec) or spec.call_tensor_parameters(width, 1) == spec.call_parameters(width)
        sizes = spec.tensor_divides(width)
        if sizes is not None and all(size % 2 == 0 for size in sizes.values()):
            assert spec.parameters(width) / 2 <= spec.tensor_parameters(width, 2) < spec.parameters(width)
