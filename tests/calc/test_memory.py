"""Memory against what torch keeps, and against arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.blocks.archs import MIXED, TINY
from zexp.blocks.resolve import resolve_model
from zexp.calc.layout import Layout
from zexp.calc.memory import inference, parameters_per_device, training
from zexp.calc.model import decode_flops, flops_per_token, parameters, weights_read
from zexp.model.build import build

BATCH, LENGTH, VOCAB = 2, 96, 64
WINDOW = {"heads": 4, "window": 16}
SCALED = {"pattern": "2*((a|m) d)", "width": 64, "norm": {"kind": "layernorm"}, "parallel": {"combine": "scaled_mean"}}
SEPARATE = {"pattern": "2*(a|d)", "width": 64, "parallel": {"norms": "separate"}}
MODELS: dict[str, dict[str, Any]] = {
    **TINY,
    "windows": {"pattern": "w d w d", "width": 64, "blocks": {"w": WINDOW, "d": {"width": 96}}},
    "scaled": {**SCALED, "blocks": {"a": {"heads": 2}, "m": {"state_size": 16, "head_dim": 16, "chunk": 16}, "d": {"width": 80}}},
    "separate": {**SEPARATE, "blocks": {"a": {"heads": 2}, "d": {"width": 80}}},
}
EXPERTS = {"pattern": "2*(a e)", "width": 16, "blocks": {"a": {"heads": 4}, "e": {"width": 12, "experts": 4, "shared_width": 8}}}


def kept(model: dict[str, Any], *, precision: str, packed: bool, kernels: str = "torch") -> int:
    """Bytes that a forward pass with its loss keeps for its backward pass, weights and the head's gradient left out."""
    built = build(model, seed=0, kernels=kernels)
    sizes = {weight.untyped_storage().data_ptr(): 0 for weight in built.parameters()}
    alive = []  # else an address may be given to two tensors

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        sizes.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(LENGTH) // 40).expand(BATCH, -1) if packed else None
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        built.loss_sum(built(tokens, documents), tokens)
    copies = 2 * sum(weight.numel() for weight in built.parameters()) if precision == "bf16" else 0
    return sum(sizes.values()) - copies - 4 * VOCAB * model["width"]


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_what_torch_keeps(name, precision, packed):
    model = resolve_model(MODELS[name], VOCAB)
    counted = training(
        model, Layout(), seq_len=LENGTH, micro_batch=BATCH, precision=precision
    ).activations
    # fp32: masks of Mamba2's documents are not counted. bf16: a block has one mean size for all of its numbers.
    within = 0.03 if precision == "fp32" else 0.15
    assert counted == pytest.approx(kept(model, precision=precision, packed=packed), rel=within)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_kernels_in_cpp_keep_no_more_than_is_counted(name, precision):
    """The count is of the torch backends; what is planned by it fits."""
    model = resolve_model(MODELS[name], VOCAB)
    counted = training(model, Layout(), seq_len=LENGTH, micro_batch=BATCH, precision=precision).activations
    assert kept(model, precision=precision, packed=True, kernels="auto") <= counted * (1.03 if precision == "fp32" else 1.15)


def mixed(**layout: Any):
    model = resolve_model(MIXED, VOCAB)
    return training(model, Layout(**layout), seq_len=LENGTH, micro_batch=1, precision=layout.pop("precision", "bf16"))


def test_adam_takes_16_bytes_a_parameter_in_fp32_and_18_in_bf16():
    model = resolve_model(MIXED, VOCAB)
    count = parameters(model)["total"]
    for precision, size in (("fp32", 16), ("bf16", 18)):
        found = training(model, Layout(), seq_len=8, micro_batch=1, precision=precision)
        assert found.total - found.activations == size * count


def test_zero_shares_out_12_of_18_bytes_then_the_gradients_then_the_weights():
    alone = mixed()
    for zero, shared in ((1, 12), (2, 16), (3, 18)):
        found = mixed(data=8, zero=zero)
        left = 18 - shared + shared / 8
        assert found.total - found.activations == pytest.approx((alone.total - alone.activations) * left / 18, abs=3)
        assert found.activations == alone.activations


def test_recomputing_keeps_the_layers_inputs_and_one_layer():
    model = resolve_model(TINY["transformer_tiny"], VOCAB)
    found = [
        training(model, Layout(checkpointing=kind), seq_len=LENGTH, micro_batch=1, precision="fp32").activations
        for kind in ("none", "full")
    ]
    inputs = 8 * 128
    largest = 128 + 1 + 128 + 4 * 341  # the MLP: its norm's input and number, the normed input, four arrays between
    assert found[1] == LENGTH * 4 * (inputs + largest + 2 * 128 + 1) < found[0]


def test_tensor_parallel_devices_hold_all_parameters_between_them():
    arch = {**TINY["zamba2_tiny"], "tie_embeddings": False}
    model = resolve_model(arch, VOCAB)
    whole, _ = parameters_per_device(model, Layout())
    half, _ = parameters_per_device(model, Layout(tensor=2))
    assert whole == parameters(model)["total"]
    width, norms = 128, 5 * 128
    replicated = norms + 2 * 128 + 128  # the stream's norms; those of the shared block
    replicated += 4 * (width * 64 + 64 * 5)  # Mamba2's B and C, which one group cannot be cut into
    replicated += 2 * (8 * width + width * width)  # of each call: the adapter's first matrix, the linear map
    assert 2 * half - whole == replicated
    kept_whole, kept_half = (
        training(model, Layout(tensor=degree), seq_len=LENGTH, micro_batch=1, precision="fp32").activations for degree in (1, 2)
    )
    assert kept_whole / 2 < kept_half < kept_whole


def test_expert_parallel_copies_hold_their_part_of_the_experts():
    model = resolve_model(EXPERTS, VOCAB)
    per_expert = 3 * 16 * 12
    dense, experts = parameters_per_device(model, Layout())
    assert experts == 2 * 4 * per_expert and dense + experts == parameters(model)["total"]
    assert parameters_per_device(model, Layout(data=4, expert=2)) == (dense, experts // 2)
    alone, spread = (
        training(model, layout, seq_len=8, micro_batch=1, precision="fp32")
        for layout in (Layout(data=4, zero=1), Layout(data=4, zero=1, expert=4))
    )
    assert spread.weights == 4 * (dense + experts // 4) < alone.weights
    assert spread.optimizer == alone.optimizer == 8 * (dense + experts) // 4  # the same in all, cut otherwise


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (Layout(data=0), ["parallelism.data = 0", "at least 1"]),
        (Layout(zero=4), ["0, 1, 2 or 3"]),
        (Layout(checkpointing="some"), ["'some'", "none, full or auto"]),
        (Layout(tensor=3), ["arch.blocks.a's heads = 4", "arch.blocks.g's heads = 2", "arch.blocks.m's heads = 4"]),
        (Layout(data=4, expert=2), ["no experts"]),
        (Layout(data=3, expert=2), ["it must divide parallelism.data = 3"]),
    ],
)
def test_illegal_layouts_are_refused(layout, says):
    problems = "\n".join(layout.problems(resolve_model(MIXED, VOCAB)))
    for text in says:
        assert text in problems


def test_a_block_without_a_tensor_parallel_form_is_named():
    model = resolve_model({"pattern": "2*(k d)", "width": 64, "blocks": {"d": {"width": 8}}}, VOCAB)
    (problem,) = Layout(tensor=2).problems(model)
    assert "rwkv7 (k) has no tensor-parallel form" in problem


def test_decoding_reads_shared_weights_at_each_call_and_one_row_of_the_embedding():
    model = resolve_model(TINY["zamba2_tiny"], 4096)
    shared = 256 + 3 * 256 * 256 + 256 * 128 + 128 + 3 * 128 * 192  # norm, q k v, out, norm, MLP
    assert weights_read(model) == parameters(model)["total"] + shared + 128
    rows = {row["context"]: row for row in inference(model, 256)}
    assert list(rows) == [256, 2048, 8192, 32768, 131072]
    added = rows[8192]["cache"] - rows[2048]["cache"]
    assert added == (8192 - 2048) * 2 * 2 * 2 * 256  # two calls, keys and values of width 256, two bytes
    assert rows[8192]["bytes"] - rows[2048]["bytes"] == added
    assert rows[8192]["flops"] - rows[2048]["flops"] == (8192 - 2048) * 2 * 4 * 256


def test_decoding_a_sequence_costs_what_its_scores_and_products_cost_at_once():
    # The mean over positions 1 .. s of attention's cost of a token is its forward FLOPs at s.
    model = resolve_model({"pattern": "2*(a w d)", "width": 16, "blocks": {"a": {"heads": 2}, "w": WINDOW, "d": {"width": 8}}}, VOCAB)
    mean = sum(decode_flops(model, context) for context in range(1, LENGTH + 1)) / LENGTH
    assert mean == pytest.approx(flops_per_token(model, LENGTH)["forward"])
