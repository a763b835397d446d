"""Sizes that are solved for: on target, legal, the same ids as sizes written by hand; and what cannot be met."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.blocks.archs import MIXED, TINY
from tests.test_cli import zexp
from zexp.blocks.resolve import resolve_model
from zexp.calc import match
from zexp.calc.model import cache_bytes, flops_per_token, parameters
from zexp.config.errors import ConfigError
from zexp.config.places import conf_dir

VOCAB, LENGTH = 4096, 256


def preset(name: str) -> dict[str, Any]:
    written = yaml.safe_load((conf_dir() / f"arch/{name}.yaml").read_text())
    written["norm"]["eps"] = float(written["norm"]["eps"])  # YAML 1.1 reads 1e-5 as a word; OmegaConf does not
    return written


def solved(arch: dict[str, Any], vocab_size: int = VOCAB, **asked: Any) -> tuple[dict[str, Any], match.Match]:
    model, found = match.resolve({**arch, "match": asked}, vocab_size, LENGTH)
    assert found is not None
    return model, found


@pytest.mark.parametrize("name", ["transformer_10m", "zamba2_10m", "swa_10m", "parallel_10m", "retnet_10m", "jamba_10m", "xlstm_10m"])
@pytest.mark.parametrize("target", [3_000_000, 7_500_000, 40_000_000])
def test_parameters_are_met_within_a_percent(name, target):
    model, found = solved(preset(name), parameters=target)
    assert parameters(model)["total"] == found.found
    assert found.found == pytest.approx(target, rel=0.01) and found.residual == found.found / target - 1


def test_other_quantities_are_met_too():
    model, found = solved(preset("moe_10m"), active_parameters="5M")
    assert parameters(model)["active"] == found.found == pytest.approx(5e6, rel=0.01)
    model, found = solved(preset("transformer_10m"), train_flops_per_token=1e8)
    assert flops_per_token(model, LENGTH)["train"] == found.found == pytest.approx(1e8, rel=0.01)
    model, found = solved(preset("zamba2_10m"), **{"inference_bytes@4K": "100M"})
    assert found.quantity == "inference_bytes@4000"
    assert 2 * parameters(model)["total"] + cache_bytes(model, 4000) == found.found == pytest.approx(1e8, rel=0.01)


@settings(max_examples=25, deadline=None)
@given(target=st.integers(200_000, 20_000_000))
def test_a_matched_model_is_the_model_of_those_sizes_written_by_hand(target):
    arch = TINY["transformer_tiny"]
    try:
        model, found = solved(arch, vocab_size=64, parameters=target)
    except ConfigError as error:
        assert "no size of this architecture is within 1%" in str(error)
        return
    sizes = {key: new for key, (_, new) in found.changed.items()}
    blocks = {"a": {"heads": sizes["arch.blocks.a.heads"]}, "d": {"width": sizes["arch.blocks.d.width"]}}
    assert model == resolve_model({**arch, "width": sizes["arch.width"], "blocks": blocks}, 64)
    assert model["width"] % 8 == 0 and abs(found.residual) <= 0.01


def test_heads_keep_their_width_and_mlps_their_ratio():
    model, found = solved(preset("llama3p2_1b"), vocab_size=128_256, parameters="4B")
    a = model["blocks"]["a"]
    assert model["width"] // a["heads"] == 64 == a["head_dim"] and a["heads"] == 4 * a["kv_heads"]
    assert model["blocks"]["d"]["width"] / model["width"] == pytest.approx(4, rel=0.5)
    assert found.line().startswith("arch.width 2048 → ")


def test_heads_change_their_width_only_where_nothing_else_meets_the_target():
    model, _ = solved(preset("zamba2_10m"), parameters="5M")  # steps of 64 leave a gap there
    assert model["width"] % 64 and 2 * model["width"] % model["blocks"]["g"]["heads"] == 0


def test_without_a_match_nothing_is_solved():
    assert match.resolve(MIXED, 64, LENGTH) == (resolve_model(MIXED, 64), None)


@pytest.mark.parametrize(
    ("arch", "asked", "says"),
    [
        ("mamba2_10m", {"parameters": "11M"}, ["arch.width=320", "arch.width=352", "-9.7%", "steps of 32", "number of layers"]),
        ("llama3p2_1b", {"parameters": "1M"}, ["17,600,640 parameters", "smaller vocabulary"]),
        ("transformer_tiny", {"params": "1M"}, ["arch.match.params", "active_parameters"]),
        ("transformer_tiny", {"parameters": "1M", "active_parameters": "1M"}, ["one quantity", "parameters, active_parameters"]),
        ("transformer_tiny", {}, ["one quantity"]),
        ("transformer_tiny", "1M", ["one quantity", "'1M'"]),
        ("transformer_tiny", {"parameters": "many"}, ["'many' is no number"]),
        ("transformer_tiny", {"parameters": -5}, ["is no number"]),
        ("transformer_tiny", {"parameters": 0}, ["at least 1"]),
        ("transformer_tiny", {"inference_bytes@": "1M"}, ["the context of inference_bytes@"]),
        ("transformer_tiny", {"inference_bytes@0": "1M"}, ["at least 1 token"]),
    ],
)
def test_what_cannot_be_met_is_said(arch, asked, says):
    with pytest.raises(ConfigError) as error:
        match.resolve({**preset(arch), "match": asked}, VOCAB if arch != "llama3p2_1b" else 128_256, LENGTH)
    for text in says:
        assert text in str(error.value)


def test_widths_between_the_steps_are_offered_without_contradicting_them():
    with pytest.raises(ConfigError) as error:
        match.resolve({**preset("xlstm_7b"), "match": {"parameters": "30M"}}, VOCAB, LENGTH)
    assert "arch.width=256" in str(error.value)
    assert "Widths at which heads keep their own width go in steps of 512 here." in str(error.value)


def test_a_part_that_a_block_does_not_have_is_no_size():
    arch = {"pattern": "a e", "width": 64, "blocks": {"a": {"heads": 4}, "e": {"width": 64, "experts": 4}}}
    _, found = solved(arch, parameters="1M")
    assert "arch.blocks.e.width" in found.changed and "arch.blocks.e.shared_width" not in found.changed


def test_mistakes_of_the_architecture_and_of_the_target_are_reported_together(tmp_path):
    words = ["arch.match={parameters:many}", "arch.blocks.a.heads=5", "execution.device=tpu"]
    done = zexp("plan", *words, cwd=tmp_path)
    assert done.returncode == 2
    for text in ("'many' is no number", "heads = 5", "device = 'tpu'"):
        assert text in done.stderr


def test_plan_says_what_was_chosen_and_the_ids_are_those_of_the_sizes(tmp_path):
    done = zexp("plan", "--json", "anneal=none", "eval=none", "arch.match={parameters:1M}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    (matched,) = plan["matched"].values()
    assert abs(matched["residual"]) <= 0.01
    sizes = [f"{key}={new}" for key, (_, new) in matched["changed"].items() if new is not None]
    by_hand = json.loads(zexp("plan", "--json", "anneal=none", "eval=none", *sizes, cwd=tmp_path).stdout)
    assert [stage["id"] for stage in plan["stages"]] == [stage["id"] for stage in by_hand["stages"]]
    text = zexp("plan", "anneal=none", "eval=none", "arch.match={parameters:1M}", cwd=tmp_path).stdout
    assert "transformer_tiny matched: " in text and "of 1,000,000" not in text and "1,000,000" in text
