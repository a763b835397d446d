"""LFM2's gated short convolutions, among attention layers, against `transformers`'."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="parity needs the extra zexp[hf]")

from tests.model.test_parity_transformers import (  # noqa: E402
    VOCAB,
    WIDTH,
    State,
    Weights,
    assert_same,
    shared_names,
)


@pytest.mark.parametrize("bias", [False, True], ids=["no biases", "biases"])
def test_lfm2(bias):
    config = transformers.Lfm2Config(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=3, full_attn_idxs=[1], num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=66, block_multiple_of=4, conv_bias=bias, norm_eps=1e-5,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Lfm2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "conv" in name:  # their draw leaves little of a convolution
                parameter.normal_(0, 0.3)

    def weights(state: State) -> Weights:
        # Their last norm is called embedding_norm; it stands before the head.
        yield from shared_names(state, "model.embedding_norm", "model.embed_tokens.weight", None)
        for layer in range(3):
            mixer, mlp, old = f"layers.{2 * layer}", f"layers.{2 * layer + 1}", f"model.layers.{layer}"
            yield f"{mixer}.norm.weight", state[f"{old}.operator_norm.weight"]
            yield f"{mlp}.norm.weight", state[f"{old}.ffn_norm.weight"]
            if layer == 1:
                qkv = [state[f"{old}.self_attn.{name}_proj.weight"] for name in "qkv"]
                yield f"{mixer}.branches.a.qkv.weight", torch.cat(qkv)
                yield f"{mixer}.branches.a.out.weight", state[f"{old}.self_attn.out_proj.weight"]
                for name in "qk":
                    norm = state[f"{old}.self_attn.{name}_layernorm.weight"]
                    yield f"{mixer}.branches.a.{name}_norm.weight", norm
            else:
                yield f"{mixer}.branches.c.conv_weight", state[f"{old}.conv.conv.weight"].squeeze(1)
                for name in ("in_proj", "out_proj"):
                    yield f"{mixer}.branches.c.{name}.weight", state[f"{old}.conv.{name}.weight"]
                    if bias:
                        yield f"{mixer}.branches.c.{name}.bias", state[f"{old}.conv.{name}.bias"]
                if bias:
                    yield f"{mixer}.branches.c.conv_bias", state[f"{old}.conv.conv.bias"]
            gate_up = [state[f"{old}.feed_forward.{name}.weight"] for name in ("w1", "w3")]
            yield f"{mlp}.branches.d.up.weight", torch.cat(gate_up)
            yield f"{mlp}.branches.d.down.weight", state[f"{old}.feed_forward.w2.weight"]

    blocks = {
        "c": {"bias": bias},
        "a": {"heads": 4, "kv_heads": 2, "qk_norm": True, "rope_theta": 1e6},
        "d": {"width": 44},  # two thirds of 66
    }
    assert_same(theirs, {"pattern": "c d a d c d", "width": WIDTH, "blocks": blocks}, weights)
