"""Blocks one by one: what is measured is the block, its FLOPs are its own, and what cannot be is refused or said."""

import pytest
import torch

from tests.bench.conftest import answer_of, asked
from zexp.bench import block_times, blocks
from zexp.bench.block_times import Passes
from zexp.bench.blocks import Point, letters_of, points
from zexp.blocks.table import TABLE, spec_class
from zexp.config.errors import ConfigError

SMALL = ("--width", "32", "--seq-len", "24", "--batch", "2", "--seconds", "3", "--device", "cpu")


def grid(*words: str) -> list[Point]:
    return points(asked(blocks, *words))[0]


@pytest.mark.parametrize("letter", TABLE)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_run_has_the_parameters_of_the_formula_and_gets_its_gradients(letter, dtype):
    (point,) = grid("--blocks", letter, "--dtype", dtype, *SMALL)
    passes = Passes(point, "cpu")
    assert sum(weight.numel() for weight in passes.weights) == point.parameters
    passes.forward()
    passes.backward()
    for tensor in (*passes.weights, *passes.inputs):
        assert tensor.grad is not None and bool(torch.isfinite(tensor.grad).all())


def test_every_block_has_a_row_with_both_passes(ceilings, capsys):
    answer = answer_of(blocks, asked(blocks, *SMALL, "--dtype", "fp32"), capsys)
    assert {row["letter"] for row in answer["rows"]} == set(TABLE) and answer["left_out"] == []
    assert answer["machine"]["kind"] == "cpu" and answer["ceilings"] == ceilings
    assert any("memory" in text for text in answer["not_measured"])
    for row in answer["rows"]:
        spec = next(point.spec for point in grid("--blocks", row["letter"], "--dtype", "fp32", *SMALL))
        assert row["forward"]["flops"] == 48 * spec.flops(32, 24)
        assert row["backward"]["flops"] == 2 * row["forward"]["flops"] and row["both"]["flops"] == 3 * row["forward"]["flops"]
        for name in ("forward", "backward", "both"):
            one = row[name]
            assert one["n"] >= 3 and 0 < one["best_seconds"] <= one["median_seconds"]
            assert one["flops_per_second"] == pytest.approx(one["flops"] / one["median_seconds"])
            assert one["share_of_matmul"] == pytest.approx(one["flops_per_second"] / ceilings["matmul_fp32"])
            assert one["attainable_flops_per_second"] == pytest.approx(min(ceilings["matmul_fp32"], one["intensity"] * ceilings["memory"]))
        assert row["both"]["bytes"] == row["forward"]["bytes"] + row["backward"]["bytes"]


def test_axes_multiply_and_keys_are_axes_too():
    found = grid("--blocks", "m", "a", "--width", "64", "128", "--dtype", "bf16", "--state-size", "8", "16", "--key", "m.chunk=16,32")
    assert len([point for point in found if point.letter == "a"]) == 2
    mamba = [(point.width, point.keys["state_size"], point.keys["chunk"]) for point in found if point.letter == "m"]
    assert sorted(mamba) == [(w, n, q) for w in (64, 128) for n in (8, 16) for q in (16, 32)]
    (nested,) = grid("--blocks", "shared", "--width", "64", "--dtype", "fp32", "--key", "g.lora_rank.mlp=4", "--key", "g.copies=1")
    assert nested.spec.lora_rank.mlp == 4 and nested.spec.mlp_width == 256  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("letter", "words", "heads", "head_dim"),
    [("a", ["--heads", "4"], 4, 32), ("m", ["--heads", "4"], 4, 64), ("k", ["--head-dim", "32"], 4, 32), ("g", ["--heads", "4"], 4, 64),
     ("a", ["--heads", "3", "--head-dim", "32"], 3, 32), ("t", [], 2, 64), ("l", ["--head-dim", "16"], 8, 16)],
)  # fmt: skip
def test_heads_are_cut_as_they_are_asked_for(letter, words, heads, head_dim):
    (point,) = grid("--blocks", letter, "--width", "128", "--dtype", "fp32", *words)
    assert point.heads == (heads, head_dim)


def test_points_that_no_block_can_have_are_left_out_with_their_reason():
    found, left_out = points(asked(blocks, "--blocks", "a", "m", "--width", "96", "128", "--heads", "3", "--dtype", "fp32"))
    assert [(point.letter, point.width) for point in found] == [("a", 96), ("m", 96)]
    assert [one.reason for one in left_out] == [
        "attention at width 128: 3 heads do not divide 128.", "mamba2 at width 128: 3 heads do not divide 256.",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="3 heads do not divide 128"):
        blocks.main(asked(blocks, "--blocks", "a", "--width", "128", "--heads", "3"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--blocks", "z", "attention"], "--blocks z: there is no such block. There are a (attention)"),
        (["--blocks", "a", "--state-size", "8"], "--state-size: none of the blocks a has it"),
        (["--blocks", "d", "--heads", "8"], "--heads: none of the blocks d has it"),
        (["--key", "m.state_size"], "--key m.state_size: write a block, a key of it and values"),
        (["--key", "state=3"], "--key state=3: write a block"),
        (["--blocks", "a", "--key", "m.chunk=3"], "the block m is not among those measured"),
        (["--key", "m.chunk=3", "--key", "m.chunk=4"], "m.chunk is given twice"),
        (["--blocks", "m", "--key", "m.chnk=3"], "there is no such key. Did you mean chunk?"),
        (["--width", "0", "--seconds", "-1"], "--seconds -1: a finite number above 0.\n--width 0: at least 1."),
        (["--plot", "x.png"], "--plot x.png: a name that ends in .html or .svg."),
        (["--plot", "/nowhere/at/all/x.svg"], "there is no folder /nowhere/at/all"),
    ],
)
def test_wrong_requests_are_refused(words, said):
    with pytest.raises(ConfigError) as refused:
        blocks.main(asked(blocks, *words))
    assert said in str(refused.value)


def test_names_and_letters_name_blocks_once():
    assert letters_of(["mamba2", "m", "a"]) == ["m", "a"]
    assert letters_of(None) == list(TABLE)


def test_what_the_time_or_the_memory_does_not_allow_is_said(ceilings, capsys, monkeypatch):
    answer = answer_of(blocks, asked(blocks, "--blocks", "a", "d", *SMALL, "--seconds", "1e-9", "--dtype", "fp32"), capsys)
    assert [row["letter"] for row in answer["rows"]] == ["a"]
    assert [one["reason"] for one in answer["left_out"]] == ["the 1e-09 s of --seconds were over."]
    monkeypatch.setattr(block_times, "memory", lambda: type("Ram", (), {"available": 1000})())
    with pytest.raises(ConfigError, match="Take a smaller batch or sequence"):
        blocks.main(asked(blocks, "--blocks", "a", *SMALL))


def test_kernels_that_cannot_be_had_are_left_out(ceilings, capsys):
    words = ("--blocks", "a", *SMALL, "--dtype", "fp32", "--kernels", "fused", "torch")
    answer = answer_of(blocks, asked(blocks, *words), capsys)
    assert [row["kernels"] for row in answer["rows"]] == ["torch"]
    (left_out,) = answer["left_out"]
    assert left_out["kernels"] == "fused" and "kernels = fused" in left_out["reason"]


def test_the_table_shows_the_axes_that_vary(ceilings, capsys):
    assert blocks.main(asked(blocks, "--blocks", "a", "m", *SMALL, "--width", "32", "64", "--dtype", "fp32")) == 0
    shown = capsys.readouterr().out
    assert "tokens 2 × 24, dtype fp32, kernels auto" in shown
    assert shown.count("attention (a)") == 2 and shown.count("mamba2 (m)") == 2


def test_the_bytes_of_a_pass_are_those_it_cannot_avoid():
    (point,) = grid("--blocks", "d", "--width", "32", "--seq-len", "16", "--batch", "1", "--dtype", "fp32", "--key", "d.width=40")
    kept = 16 * 4 * spec_class("d")(width=40).saved_elements(32, 16)  # type: ignore[call-arg]
    weights, stream = 4 * 3 * 32 * 40, 16 * 32 * 4
    assert point.moved_bytes == {"forward": weights + 2 * stream + kept, "backward": 2 * weights + 2 * stream + kept}
