"""Sizes of one number of parameters: which are tried, and what is concluded from their times."""

import argparse
import json

import pytest

from tests.bench.conftest import answer_of, asked, with_config
from zexp.bench import candidates, size, size_times
from zexp.bench.candidates import BASE, HEADS, MLP, VOCABULARY, WIDTH, alignment, combined
from zexp.bench.marks import BETWEEN, FORWARD, Spell
from zexp.calc import match
from zexp.calc import model as calc
from zexp.config.errors import ConfigError
from zexp.train.batches import Batch

TRANSFORMER = {"pattern": "4*(a d)", "width": 64, "blocks": {"a": {"heads": 4}, "d": {"width": 171}}}
HYBRID = {
    "pattern": "m gm m gm", "width": 128,
    "blocks": {"m": {"state_size": 32, "head_dim": 32, "chunk": 64}, "g": {"heads": 4, "mlp_width": 192}},
}  # fmt: skip
SMALL = ("arch=transformer_tiny", "seq_len=32", "phases.pretrain.batch_tokens=256", "execution.device=cpu", "execution.micro_batch=2")


def tried(arch, parameters, tolerance=0.03, vocab_size=500, widths=None):
    return candidates.candidates(arch, vocab_size, parameters, tolerance, widths)


@pytest.mark.parametrize(("arch", "parameters"), [(TRANSFORMER, 600_000), (HYBRID, 1_500_000)])
def test_candidates_have_the_budgets_parameters_and_differ_in_one_thing(arch, parameters):
    base, *others = tried(arch, parameters)
    found, _ = match.resolve({**arch, "match": {"parameters": parameters}}, 500, 1)
    assert base.model == found and base.factor == BASE and base.keys == {}
    assert {HEADS, VOCABULARY} <= {one.factor for one in others}
    for one in others:
        assert abs(one.parameters / parameters - 1) <= 0.03 and calc.parameters(one.model)["total"] == one.parameters
        assert one.keys and one.model != base.model
        if one.factor == VOCABULARY:
            assert set(one.keys) == {"arch.vocab_size"} and one.model["vocab_size"] > 500
        elif one.factor in (HEADS, MLP):
            assert one.model["width"] == base.model["width"] and "arch.width" not in one.keys
        else:
            assert one.model["width"] != base.model["width"]
    assert len({json.dumps(one.model) for one in others}) == len(others)


def test_heads_are_cut_twice_as_fine_and_half_as_fine():
    base, *others = tried(HYBRID, 850_000, tolerance=0.1)
    found = [one.keys for one in others if one.factor == HEADS]
    assert {"arch.blocks.m.head_dim": 16} in found and {"arch.blocks.m.head_dim": 64} in found
    heads = base.arch["blocks"]["g"]["heads"]
    assert heads % 2 == 0, "a number that can be halved"
    assert {"arch.blocks.g.heads": 2 * heads} in found and {"arch.blocks.g.heads": heads // 2} in found


def test_widths_may_be_named_and_one_that_cannot_be_had_is_refused():
    found = [one for one in tried(TRANSFORMER, 600_000, widths=[80, 104]) if one.factor == WIDTH]
    assert [one.model["width"] for one in found] == [80, 104]
    with pytest.raises(ConfigError, match=r"--width 400: the nearest size has .* parameters"):
        tried(TRANSFORMER, 600_000, widths=[400])


def test_a_budget_that_no_size_has_is_refused_with_the_nearest():
    only = {"pattern": "2*m", "width": 64, "blocks": {"m": {"state_size": 16, "head_dim": 64}}}
    with pytest.raises(ConfigError, match=r"--parameters 150,000: the nearest size of this architecture has .*--tolerance is 1%"):
        tried(only, 150_000, tolerance=0.01)
    base, *_ = tried(only, 150_000, tolerance=0.5)
    assert base.parameters == min((one.parameters for one in [base]), key=lambda count: abs(count - 150_000))
    with pytest.raises(ConfigError, match="there is no block 'z'"):
        tried({"pattern": "z", "width": 64}, 150_000)


def test_what_several_change_goes_together():
    base, *others = tried(TRANSFORMER, 600_000)
    heads = next(one for one in others if one.factor == HEADS)
    rows = next(one for one in others if one.factor == VOCABULARY)
    both = combined(base, [heads, rows], 500)
    assert both is not None and both.keys == {**heads.keys, **rows.keys}
    assert both.model["vocab_size"] == rows.model["vocab_size"] and both.model["blocks"] == heads.model["blocks"]
    assert combined(base, [heads], 500) is None


def test_each_distinct_layer_is_built_once_and_counts_as_often_as_it_stands():
    model = tried(HYBRID, 1_500_000)[0].model
    assert size_times.reduced({**model, "pattern": ["m", "gm", "m", "gm", "m"]})["pattern"] == ["m", "gm"]
    rwkv = {"pattern": "4*(k d)", "width": 64, "blocks": {"k": {"head_dim": 16}, "d": {"width": 64}}}
    full = tried(rwkv, 600_000, tolerance=0.5)[0].model
    assert size_times.reduced(full)["pattern"] == ["k", "d", "k"], "the first k lacks weights that the others have"


def test_a_round_is_the_sum_over_the_layers_of_the_whole_pattern():
    options = with_config(asked(size, "--parameters", "1.3M", "--seconds", "1"), SMALL)
    question = size.question_of(options)
    batch: Batch = size_times.random_batch(question, "cpu")
    base = question.candidates[0]
    sample = size_times.Sample(base, size_times.reduced(base.model), question, batch, "cpu")
    lap = {Spell("a", FORWARD): 1.0, Spell("d", FORWARD): 2.0, Spell("embedding", FORWARD): 0.5, Spell(BETWEEN, FORWARD): 0.25}
    assert sample.seconds(lap) == 4 * 1.0 + 4 * 2.0 + 0.5 + 0.25


def test_the_candidates_of_a_config_are_ranked(ceilings, capsys):
    options = with_config(asked(size, "--parameters", "1.3M", "--seconds", "0.5", "--tolerance", "0.02"), SMALL)
    answer = answer_of(size, options, capsys)
    assert answer["parameters"] == 1_300_000 and answer["rounds"] >= 6 and answer["machine"]["kind"] == "cpu"
    base, *others = answer["candidates"]
    assert base["factor"] == "base" and base["over_base"] == {"median": 1.0, "low": 1.0, "high": 1.0} and others
    for row in answer["candidates"]:
        assert abs(row["parameters"] / 1_300_000 - 1) <= 0.02
        assert row["flops_per_second"] == pytest.approx(row["tokens_per_second"] * row["flops_per_token"])
        assert row["over_base"]["low"] <= row["over_base"]["median"] <= row["over_base"]["high"]
        certain = row["over_base"]["low"] > 1 or row["over_base"]["high"] < 1
        assert (row["verdict"] in ("faster", "slower")) == certain
        assert set(row["parts"]) == {"attention", "mlp", "head and loss"}
    assert answer["facts"] and (answer["whole"] is not None or answer["not_measured"])


def test_facts_say_what_was_measured_and_no_more():
    def row(factor, name, width, verdict, rate, part):
        return {
            "factor": factor, "name": name, "width": width, "verdict": verdict, "flops_per_second": rate,
            "parts": {"mlp": {"flops_per_second": 1.0, "over_base": part}},
        }  # fmt: skip

    rows = [
        row("base", "base", 64, "base", 4e10, 1.0), row("width", "width 72", 72, "slower", 2e10, 0.5),
        row("width", "width 56", 56, "cannot distinguish", 4e10, 0.7),
    ]  # fmt: skip
    assert size_times.facts(rows) == [
        "Widths by the largest power of two that divides them: 8: 30 GFLOP/s (2), 64: 40 GFLOP/s (1).",
        "Of 2 other widths, 0 faster than the base, 1 slower, 1 not to be distinguished from it.",
        "width 72 is slower; FLOP/s over the base's: mlp 0.50 times.",
    ]
    same = [one | {"verdict": "base" if one is rows[0] else "cannot distinguish"} for one in rows]
    assert size_times.facts(same) == ["Of 2 other widths, 0 faster than the base, 0 slower, 2 not to be distinguished from it."]
    assert [alignment(value) for value in (1, 24, 96, 4096)] == [1, 8, 32, 1024]


@pytest.mark.parametrize(
    ("words", "config", "said"),
    [
        (["--parameters", "x"], (), "--parameters = 'x' is no number"),
        (["--parameters", "0"], (), "--parameters 0: at least 1."),
        (["--parameters", "1M", "--tolerance", "2", "--width", "0"], (), "--tolerance 2: a share above 0"),
        (["--parameters", "1M"], ("arch.match={parameters:2M}",), "arch.match is what --parameters says here"),
    ],
)
def test_wrong_requests_are_refused(words, config, said):
    with pytest.raises(ConfigError) as refused:
        size.main(with_config(asked(size, *words), (*SMALL, *config)))
    assert said in str(refused.value)


def test_one_config_is_compared_and_an_arch_is_named_once():
    options = with_config(asked(size, "--parameters", "1M", "--arch", "mamba2_tiny"), SMALL, SMALL)
    with pytest.raises(ConfigError, match="compares sizes of one"):
        size.main(options)
    assert size.overrides(options, ["seq_len=64"]) == ["arch=mamba2_tiny"]
    with pytest.raises(ConfigError, match="Keep one"):
        size.overrides(options, ["arch=zamba2_tiny"])


def test_widths_stand_between_commas_so_that_overrides_can_follow(capsys):
    parser = argparse.ArgumentParser()
    size.add_arguments(parser)
    options, words = parser.parse_known_args(["--parameters", "1M", "--width", "64,96", "seq_len=64"])
    assert options.width == [64, 96] and words == ["seq_len=64"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--parameters", "1M", "--width", "64;96"])
    assert "'64;96': whole numbers with commas between them" in capsys.readouterr().err


def test_what_wins_is_built_whole_beside_the_base(ceilings, capsys, monkeypatch):
    monkeypatch.setattr(size_times, "_verdict", lambda ratio: "faster")
    options = with_config(asked(size, "--parameters", "1.3M", "--seconds", "30", "--tolerance", "0.02"), SMALL)
    monkeypatch.setattr(size_times, "in_turns", lambda works, device, **_: [work() for _ in range(7) for work in works.values()])
    whole = answer_of(size, options, capsys)["whole"]
    assert whole["over_base"]["median"] == pytest.approx(whole["tokens_per_second"] / whole["base_tokens_per_second"], rel=0.5)
    assert whole["keys"] and abs(whole["parameters"] / 1_300_000 - 1) <= 0.02
    assert whole["combined"] == (whole["factor"] == "combined")


def test_a_whole_model_that_would_take_too_long_is_not_built(ceilings, capsys, monkeypatch):
    monkeypatch.setattr(size_times, "_verdict", lambda ratio: "faster")
    options = with_config(asked(size, "--parameters", "1.3M", "--seconds", "0.001", "--tolerance", "0.02"), SMALL)
    answer = answer_of(size, options, capsys)
    assert answer["whole"] is None and "more than --seconds 0.001" in answer["not_measured"][0]
