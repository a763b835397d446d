"""Logits of our models and of `transformers`' with the same random weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from zexp.blocks.resolve import resolve_model
from zexp.model.build import build

transformers = pytest.importorskip("transformers", reason="parity needs the extra zexp[hf]")

VOCAB, WIDTH, LENGTH = 97, 32, 37  # a length that no chunk divides
Weights = Iterator[tuple[str, torch.Tensor]]


def assert_same_logits(theirs: Any, arch: dict[str, Any], weights: Weights) -> None:
    theirs.eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)  # norms start at 1: a missing one would not show
            elif parameter.dim() > 1 and "conv" not in name:
                parameter.normal_(0, 0.3)  # the library's 0.02 leaves outputs too small to tell models apart
        ours = build(resolve_model(arch, VOCAB), seed=None)
        loaded = ours.load_state_dict(dict(weights))
        assert not loaded.missing_keys and not loaded.unexpected_keys
        tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
        expected = theirs(tokens).logits
        logits = ours.logits(ours(tokens))
    assert expected.std() > 0.5
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def shared_names(theirs: Any, norm: str, embedding: str, head: bool) -> Weights:
    state = theirs.state_dict()
    yield "embedding.weight", state[embedding]
    yield "norm.weight", state[norm]
    if head:
        yield "head.weight", state["lm_head.weight"]


def mamba2_weights(state: dict[str, torch.Tensor], theirs: str, ours: str) -> Weights:
    for name in ("in_proj.weight", "out_proj.weight", "dt_bias", "A_log", "D"):
        yield f"{ours}.{name}", state[f"{theirs}.{name}"]
    yield f"{ours}.conv_weight", state[f"{theirs}.conv1d.weight"].squeeze(1)
    yield f"{ours}.conv_bias", state[f"{theirs}.conv1d.bias"]
    yield f"{ours}.norm_weight", state[f"{theirs}.norm.weight"]


def test_llama_with_grouped_heads():
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=44, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config)

    def weights() -> Weights:
        state = theirs.state_dict()
        yield from shared_names(theirs, "model.norm.weight", "model.embed_tokens.weight", head=True)
        for layer in range(2):
            attention, mlp = f"layers.{2 * layer}", f"layers.{2 * layer + 1}"
            old = f"model.layers.{layer}"
            yield f"{attention}.norm.weight", state[f"{old}.input_layernorm.weight"]
            yield f"{mlp}.norm.weight", state[f"{old}.post_attention_layernorm.weight"]
            qkv = [state[f"{old}.self_attn.{name}_proj.weight"] for name in "qkv"]
            yield f"{attention}.branches.a.qkv.weight", torch.cat(qkv)
            yield f"{attention}.branches.a.out.weight", state[f"{old}.self_attn.o_proj.weight"]
            gate_up = [state[f"{old}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
            yield f"{mlp}.branches.d.up.weight", torch.cat(gate_up)
            yield f"{mlp}.branches.d.down.weight", state[f"{old}.mlp.down_proj.weight"]

    blocks = {"a": {"heads": 4, "kv_heads": 2}, "d": {"width": 44}}
    arch = {"pattern": "2*(a d)", "width": WIDTH, "tie_embeddings": False, "blocks": blocks}
    assert_same_logits(theirs, arch, weights())


def test_mamba2_with_groups():
    config = transformers.Mamba2Config(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, state_size=8, head_dim=8, num_heads=8, n_groups=2,
        expand=2, chunk_size=8, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Mamba2ForCausalLM(config)

    def weights() -> Weights:
        state = theirs.state_dict()
        yield from shared_names(theirs, "backbone.norm_f.weight", "backbone.embeddings.weight", head=False)
        for layer in range(2):
            yield f"layers.{layer}.norm.weight", state[f"backbone.layers.{layer}.norm.weight"]
            yield from mamba2_weights(state, f"backbone.layers.{layer}.mixer", f"layers.{layer}.branches.m")

    m = {"state_size": 8, "head_dim": 8, "groups": 2, "chunk": 16}
    assert_same_logits(theirs, {"pattern": "2*m", "width": WIDTH, "blocks": {"m": m}}, weights())


@pytest.mark.parametrize("rope", [False, True], ids=["no positions", "rope"])
@pytest.mark.parametrize("adapters", [False, True], ids=["mlp adapters", "attention adapters"])
def test_zamba2_with_two_shared_blocks(rope, adapters):
    config = transformers.Zamba2Config(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=5, num_attention_heads=4, attention_head_dim=16,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid", "hybrid"], mamba_d_state=8, mamba_headdim=8,
        mamba_expand=2, n_mamba_heads=8, mamba_ngroups=2, num_mem_blocks=2, adapter_rank=4, use_mem_rope=rope,
        use_shared_attention_adapter=adapters, intermediate_size=48, chunk_size=8, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Zamba2ForCausalLM(config)
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))  # time_step_min = 0, which its initialisation cannot take

    def weights() -> Weights:
        state = theirs.state_dict()
        yield from shared_names(theirs, "model.final_layernorm.weight", "model.embed_tokens.weight", head=False)
        calls = {1: 0, 3: 1, 4: 2}
        for layer in range(5):
            old = f"model.layers.{layer}" + (".mamba_decoder" if layer in calls else "")
            yield f"layers.{layer}.norm.weight", state[f"{old}.input_layernorm.weight"]
            yield from mamba2_weights(state, f"{old}.mamba", f"layers.{layer}.branches.m")
        for layer, call in calls.items():
            old = f"model.layers.{layer}.shared_transformer"
            yield f"layers.{layer}.call.linear.weight", state[f"model.layers.{layer}.linear.weight"]
            pairs = {"mlp": f"{old}.feed_forward.gate_up_proj_adapter_list"}
            if adapters:
                pairs |= {f"qkv.{i}": f"{old}.self_attn.linear_{name}_adapter_list" for i, name in enumerate("qkv")}
            for name, adapter in pairs.items():
                yield f"layers.{layer}.call.{name}.down.weight", state[f"{adapter}.{call}.0.weight"]
                yield f"layers.{layer}.call.{name}.up.weight", state[f"{adapter}.{call}.1.weight"]
        for copy, layer in enumerate((1, 3)):
            old, new = f"model.layers.{layer}.shared_transformer", f"shared.g.{copy}"
            yield f"{new}.input_norm.weight", state[f"{old}.input_layernorm.weight"]
            yield f"{new}.mlp_norm.weight", state[f"{old}.pre_ff_layernorm.weight"]
            yield f"{new}.qkv.weight", torch.cat([state[f"{old}.self_attn.{name}_proj.weight"] for name in "qkv"])
            yield f"{new}.out.weight", state[f"{old}.self_attn.o_proj.weight"]
            yield f"{new}.up.weight", state[f"{old}.feed_forward.gate_up_proj.weight"]
            yield f"{new}.down.weight", state[f"{old}.feed_forward.down_proj.weight"]

    blocks = {
        "m": {"state_size": 8, "head_dim": 8, "groups": 2, "chunk": 16},
        "g": {
            "copies": 2,
            "heads": 4,
            "mlp_width": 48,
            "lora_rank": {"mlp": 4, "attention": 4 if adapters else 0},
            "rope_theta": 10000.0 if rope else None,
        },
    }
    assert_same_logits(theirs, {"pattern": "m gm m 2*gm", "width": WIDTH, "blocks": blocks}, weights())
