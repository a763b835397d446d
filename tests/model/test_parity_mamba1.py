"""Mamba, Zamba and Jamba of `transformers` with the same random weights."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="parity needs the extra zexp[hf]")

from tests.model.test_parity_moe import expert_weights  # noqa: E402
from tests.model.test_parity_transformers import VOCAB, WIDTH, State, Weights, assert_same, shared_names  # noqa: E402

QKV_NAMES = ("q_proj", "k_proj", "v_proj")


def mamba1_weights(state: State, theirs: str, ours: str) -> Weights:
    """The names of Mamba and Jamba, whose mixers have one head."""
    for name in ("in_proj", "out_proj"):
        for kind in ("weight", "bias"):
            if f"{theirs}.{name}.{kind}" in state:
                yield f"{ours}.{name}.{kind}", state[f"{theirs}.{name}.{kind}"]
    yield f"{ours}.conv_weight", state[f"{theirs}.conv1d.weight"].squeeze(1)
    if f"{theirs}.conv1d.bias" in state:
        yield f"{ours}.conv_bias", state[f"{theirs}.conv1d.bias"]
    yield f"{ours}.x_proj", state[f"{theirs}.x_proj.weight"][None]
    yield f"{ours}.dt_proj", state[f"{theirs}.dt_proj.weight"][None]
    yield f"{ours}.dt_bias", state[f"{theirs}.dt_proj.bias"]
    for name in ("A_log", "D"):
        yield f"{ours}.{name}", state[f"{theirs}.{name}"]
    for number, name in enumerate(("dt", "b", "c")):
        if f"{theirs}.{name}_layernorm.weight" in state:
            yield f"{ours}.norms.{number}.weight", state[f"{theirs}.{name}_layernorm.weight"]


def zamba_mixer_weights(state: State, theirs: str, ours: str) -> Weights:
    """Zamba's rows of in_proj alternate: x's even, the gate's odd. All else stands by head."""
    rows = state[f"{theirs}.in_proj.weight"]
    yield f"{ours}.in_proj.weight", torch.cat((rows[0::2], rows[1::2]))
    yield f"{ours}.out_proj.weight", state[f"{theirs}.out_proj.weight"]
    yield f"{ours}.conv_weight", state[f"{theirs}.conv1d.weight"].squeeze(1)
    yield f"{ours}.conv_bias", state[f"{theirs}.conv1d.bias"]
    yield f"{ours}.x_proj", state[f"{theirs}.x_proj_weight"]
    yield f"{ours}.dt_proj", state[f"{theirs}.dt_proj_weight"]
    yield f"{ours}.dt_bias", state[f"{theirs}.dt_proj_bias"].flatten()
    for name in ("A_log", "D"):
        yield f"{ours}.{name}", state[f"{theirs}.{name}"].flatten(0, 1)


@pytest.mark.parametrize("biases", [False, True], ids=["as published", "with other biases"])
def test_mamba(biases):
    config = transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=3, state_size=5, time_step_rank=3 if biases else "auto",
        use_bias=biases, use_conv_bias=not biases, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.MambaForCausalLM(config)

    def weights(state: State) -> Weights:
        yield from shared_names(state, "backbone.norm_f", "backbone.embeddings.weight", None)
        for layer in range(3):
            yield f"layers.{layer}.norm.weight", state[f"backbone.layers.{layer}.norm.weight"]
            yield from mamba1_weights(state, f"backbone.layers.{layer}.mixer", f"layers.{layer}.branches.r")

    r = {"state_size": 5, "dt_rank": 3 if biases else None, "bias": biases, "conv_bias": not biases}
    assert_same(theirs, {"pattern": "3*r", "width": WIDTH, "blocks": {"r": r}}, weights)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_zamba_feeds_a_shared_block_to_mamba_layers_of_some_heads(heads):
    config = transformers.ZambaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=4, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=4, n_mamba_heads=heads, mamba_d_state=5,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.ZambaForCausalLM(config)
    hybrid = (1, 3)

    def weights(state: State) -> Weights:
        yield from shared_names(state, "model.final_layernorm", "model.embed_tokens.weight", None)
        for layer in range(4):
            old = f"model.layers.{layer}" + (".mamba_decoder" if layer in hybrid else "")
            yield f"layers.{layer}.norm.weight", state[f"{old}.input_layernorm.weight"]
            yield from zamba_mixer_weights(state, f"{old}.mamba", f"layers.{layer}.branches.r")
        for layer in hybrid:
            yield f"layers.{layer}.call.linear.weight", state[f"model.layers.{layer}.linear.weight"]
        old, new = f"model.layers.{hybrid[0]}.shared_transf", "shared.g.0"
        yield f"{new}.input_norm.weight", state[f"{old}.input_layernorm.weight"]
        yield f"{new}.mlp_norm.weight", state[f"{old}.pre_ff_layernorm.weight"]
        yield f"{new}.qkv.weight", torch.cat([state[f"{old}.self_attn.{name}.weight"] for name in QKV_NAMES])
        yield f"{new}.out.weight", state[f"{old}.self_attn.o_proj.weight"]
        gate_up = [state[f"{old}.feed_forward.{name}_proj.weight"] for name in ("gate", "up")]
        yield f"{new}.up.weight", torch.cat(gate_up)
        yield f"{new}.down.weight", state[f"{old}.feed_forward.down_proj.weight"]

    blocks = {"r": {"state_size": 5, "heads": heads}, "g": {"heads": 4, "mlp_width": 48}}
    assert_same(theirs, {"pattern": "r gr r gr", "width": WIDTH, "blocks": blocks}, weights)


def test_jamba_norms_what_selects():
    config = transformers.JambaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=44, num_experts=4, num_experts_per_tok=2, attn_layer_period=4, attn_layer_offset=2,
        mamba_d_state=5, rms_norm_eps=1e-5,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.JambaForCausalLM(config)

    def weights(state: State) -> Weights:
        yield from shared_names(state, "model.final_layernorm", "model.embed_tokens.weight", "lm_head.weight")
        for layer in range(4):
            mixer, channel, old = f"layers.{2 * layer}", f"layers.{2 * layer + 1}", f"model.layers.{layer}"
            yield f"{mixer}.norm.weight", state[f"{old}.input_layernorm.weight"]
            yield f"{channel}.norm.weight", state[f"{old}.pre_ff_layernorm.weight"]
            if layer == 2:
                qkv = [state[f"{old}.self_attn.{name}.weight"] for name in QKV_NAMES]
                yield f"{mixer}.branches.a.qkv.weight", torch.cat(qkv)
                yield f"{mixer}.branches.a.out.weight", state[f"{old}.self_attn.o_proj.weight"]
            else:
                yield from mamba1_weights(state, f"{old}.mamba", f"{mixer}.branches.r")
            if layer % 2:
                yield from expert_weights(state, f"{old}.feed_forward", f"{channel}.branches.e", router="router")
            else:
                gate_up = [state[f"{old}.feed_forward.{name}_proj.weight"] for name in ("gate", "up")]
                yield f"{channel}.branches.d.up.weight", torch.cat(gate_up)
                yield f"{channel}.branches.d.down.weight", state[f"{old}.feed_forward.down_proj.weight"]

    blocks = {
        "r": {"state_size": 5, "inner_norms": True},
        "a": {"heads": 4, "kv_heads": 2, "rope_theta": None},
        "d": {"width": 44},
        "e": {"width": 44, "experts": 4, "normalise": False},
    }
    arch = {"pattern": "r d r e a d r e", "width": WIDTH, "tie_embeddings": False, "blocks": blocks}
    assert_same(theirs, arch, weights)
