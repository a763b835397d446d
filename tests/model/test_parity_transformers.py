"""Logits and gradients of our models and of `transformers`' with the same random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from zexp.blocks.resolve import resolve_model
from zexp.model.build import build

transformers = pytest.importorskip("transformers", reason="parity needs the extra zexp[hf]")

VOCAB, WIDTH, LENGTH = 97, 32, 37  # a length that no chunk divides
State = dict[str, torch.Tensor]
Weights = Iterator[tuple[str, torch.Tensor]]


def assert_same(theirs: Any, arch: dict[str, Any], weights: Callable[[State], Weights]) -> None:
    """Logits, and the gradients of a loss with respect to all weights.

    weights: from their tensors by name (weights or gradients) to ours.
    """
    theirs.eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)  # norms start at 1: a missing one would not show
            elif parameter.dim() > 1 and "conv" not in name:
                parameter.normal_(0, 0.2)  # the library's 0.02 leaves outputs too small to tell models apart, 0.3 makes gradients whose fp32 rounding shows
            elif name.endswith("bias") and "conv" not in name and "dt" not in name:
                parameter.normal_(0, 0.2)
    ours = build(resolve_model(arch, VOCAB), seed=None)
    named = dict(theirs.named_parameters(remove_duplicate=False))
    loaded = ours.load_state_dict(dict(weights(named)))
    assert not loaded.missing_keys and not loaded.unexpected_keys
    tokens = torch.randint(1, VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))  # 0 pads
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    expected = theirs(inputs).logits
    hidden = ours(inputs)
    logits = ours.logits(hidden)
    assert expected.std() > 0.5
    # Relative to the largest, whose rounding in fp32 it is.
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()

    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    ours.loss_sum(hidden, labels).backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in weights(gradients):
        mine = ours.get_parameter(name).grad
        # Relative to the tensor's own largest gradient, or to rounding of the model's largest where that is nothing.
        bound = 1e-3 * gradient.abs().max() + 1e-6 * largest
        assert (mine - gradient).abs().max() < bound, name


def shared_names(state: State, norm: str, embedding: str, head: str | None) -> Weights:
    yield "embedding.weight", state[embedding]
    for kind in ("weight", "bias"):
        if f"{norm}.{kind}" in state:
            yield f"norm.{kind}", state[f"{norm}.{kind}"]
    if head is not None:
        yield "head.weight", state[head]


def mamba2_weights(state: State, theirs: str, ours: str) -> Weights:
    for name in ("in_proj.weight", "out_proj.weight", "dt_bias", "A_log", "D"):
        yield f"{ours}.{name}", state[f"{theirs}.{name}"]
    yield f"{ours}.conv_weight", state[f"{theirs}.conv1d.weight"].squeeze(1)
    yield f"{ours}.conv_bias", state[f"{theirs}.conv1d.bias"]
    yield f"{ours}.norm_weight", state[f"{theirs}.norm.weight"]


def llama_weights(state: State, layers: int, head: bool, letter: str = "a") -> Weights:
    """The names of Llama and of those that follow it, as N·(a d)."""
    yield from shared_names(state, "model.norm", "model.embed_tokens.weight", "lm_head.weight" if head else None)
    for layer in range(layers):
        attention, mlp = f"layers.{2 * layer}", f"layers.{2 * layer + 1}"
        old = f"model.layers.{layer}"
        yield f"{attention}.norm.weight", state[f"{old}.input_layernorm.weight"]
        yield f"{mlp}.norm.weight", state[f"{old}.post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            if f"{old}.self_attn.q_proj.{kind}" in state:
                qkv = [state[f"{old}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
                yield f"{attention}.branches.{letter}.qkv.{kind}", torch.cat(qkv)
            if f"{old}.self_attn.o_proj.{kind}" in state:
                yield f"{attention}.branches.{letter}.out.{kind}", state[f"{old}.self_attn.o_proj.{kind}"]
            if f"{old}.mlp.gate_proj.{kind}" in state:
                gate_up = [state[f"{old}.mlp.{name}_proj.{kind}"] for name in ("gate", "up")]
                yield f"{mlp}.branches.d.up.{kind}", torch.cat(gate_up)
                yield f"{mlp}.branches.d.down.{kind}", state[f"{old}.mlp.down_proj.{kind}"]
        for name in "qk":
            if f"{old}.self_attn.{name}_norm.weight" in state:
                yield f"{attention}.branches.{letter}.{name}_norm.weight", state[f"{old}.self_attn.{name}_norm.weight"]


LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_llama(kv_heads):
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, num_key_value_heads=kv_heads))
    blocks = {"a": {"heads": 4, "kv_heads": kv_heads}, "d": {"width": 44}}
    arch = {"pattern": "2*(a d)", "width": WIDTH, "tie_embeddings": False, "blocks": blocks}
    assert_same(theirs, arch, lambda state: llama_weights(state, 2, head=True))


def test_llama_with_biases_and_llama_3_positions():
    scaling = {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    config = transformers.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True, rope_parameters=scaling)
    rope = {"factor": 4.0, "low_turns": 1.0, "high_turns": 4.0, "original_positions": 16}
    blocks = {
        "a": {"heads": 4, "bias": True, "rope_theta": 500.0, "rope_scaling": rope},
        "d": {"width": 44, "bias": True},
    }
    arch = {"pattern": "2*(a d)", "width": WIDTH, "tie_embeddings": False, "blocks": blocks}
    assert_same(transformers.LlamaForCausalLM(config), arch, lambda state: llama_weights(state, 2, head=True))


def test_qwen3_norms_queries_and_keys():
    config = transformers.Qwen3Config(**LLAMA, num_key_value_heads=2, head_dim=12, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    blocks = {"a": {"heads": 4, "kv_heads": 2, "head_dim": 12, "qk_norm": True}, "d": {"width": 44}}
    arch = {"pattern": "2*(a d)", "width": WIDTH, "tie_embeddings": False, "blocks": blocks}
    assert_same(transformers.Qwen3ForCausalLM(config), arch, lambda state: llama_weights(state, 2, head=True))


@pytest.mark.parametrize("window", [1, 5, 16, 30])
def test_mistral_sees_a_window(window):
    config = transformers.MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=window)
    config._attn_implementation = "eager"
    blocks = {"w": {"heads": 4, "kv_heads": 2, "window": window}, "d": {"width": 44}}
    arch = {"pattern": "2*(w d)", "width": WIDTH, "tie_embeddings": False, "blocks": blocks}
    theirs = transformers.MistralForCausalLM(config)
    assert_same(theirs, arch, lambda state: llama_weights(state, 2, head=True, letter="w"))


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "one after the other"])
def test_gpt_neox_with_partial_positions(parallel):
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        hidden_act="gelu", layer_norm_eps=1e-5, use_parallel_residual=parallel, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    theirs = transformers.GPTNeoXForCausalLM(config)

    def weights(state: State) -> Weights:
        yield from shared_names(state, "gpt_neox.final_layer_norm", "gpt_neox.embed_in.weight", "lm_head.weight" if "lm_head.weight" in state else "embed_out.weight")
        for layer in range(2):
            attention, mlp = (f"layers.{layer}", f"layers.{layer}") if parallel else (f"layers.{2 * layer}", f"layers.{2 * layer + 1}")
            old = f"gpt_neox.layers.{layer}"
            for kind in ("weight", "bias"):
                a, d = (".norms.a", ".norms.d") if parallel else (".norm", ".norm")
                yield f"{attention}{a}.{kind}", state[f"{old}.input_layernorm.{kind}"]
                yield f"{mlp}{d}.{kind}", state[f"{old}.post_attention_layernorm.{kind}"]
                # Their rows go head by head (q, k, v of the first head, ...); ours are all q, all k, all v.
                rows = state[f"{old}.attention.query_key_value.{kind}"].unflatten(0, (4, 3, 8)).transpose(0, 1)
                yield f"{attention}.branches.a.qkv.{kind}", rows.flatten(0, 2)
                yield f"{attention}.branches.a.out.{kind}", state[f"{old}.attention.dense.{kind}"]
                yield f"{mlp}.branches.d.up.{kind}", state[f"{old}.mlp.dense_h_to_4h.{kind}"]
                yield f"{mlp}.branches.d.down.{kind}", state[f"{old}.mlp.dense_4h_to_h.{kind}"]

    arch = {
        "pattern": "2*(a|d)" if parallel else "2*(a d)",
        "width": WIDTH,
        "tie_embeddings": False,
        "norm": {"kind": "layernorm", "eps": 1e-5},
        "blocks": {
            "a": {"heads": 4, "bias": True, "rope_fraction": 0.5},
            "d": {"width": 64, "activation": "gelu_erf", "bias": True},
        },
    } | ({"parallel": {"norms": "separate"}} if parallel else {})
    assert_same(theirs, arch, weights)


def test_bamba_mixes_attention_with_mamba2():
    config = transformers.BambaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=3, attn_layer_indices=[1], num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=44, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=2,
        mamba_chunk_size=8, tie_word_embeddings=False, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    theirs = transformers.BambaForCausalLM(config)

    def weights(state: State) -> Weights:
        yield from shared_names(state, "model.final_layernorm", "model.embed_tokens.weight", "lm_head.weight")
        for layer in range(3):
            mixer, mlp, old = f"layers.{2 * layer}", f"layers.{2 * layer + 1}", f"model.layers.{layer}"
            yield f"{mixer}.norm.weight", state[f"{old}.input_layernorm.weight"]
            yield f"{mlp}.norm.weight", state[f"{old}.pre_ff_layernorm.weight"]
            if layer == 1:
                qkv = [state[f"{old}.self_attn.{name}_proj.weight"] for name in "qkv"]
                yield f"{mixer}.branches.a.qkv.weight", torch.cat(qkv)
                yield f"{mixer}.branches.a.out.weight", state[f"{old}.self_attn.o_proj.weight"]
            else:
                yield from mamba2_weights(state, f"{old}.mamba", f"{mixer}.branches.m")
            gate_up = [state[f"{old}.feed_forward.{name}_proj.weight"] for name in ("gate", "up")]
            yield f"{mlp}.branches.d.up.weight", torch.cat(gate_up)
            yield f"{mlp}.branches.d.down.weight", state[f"{old}.feed_forward.down_proj.weight"]

    arch = {
        "pattern": "m d a d m d",
        "width": WIDTH,
        "tie_embeddings": False,
        "blocks": {
            "m": {"state_size": 8, "head_dim": 8, "groups": 2, "chunk": 16},
            "a": {"heads": 4, "kv_heads": 2, "rope_fraction": 0.5},
            "d": {"width": 44},
        },
    }
    assert_same(theirs, arch, weights)


def test_mamba2_with_groups():
    config = transformers.Mamba2Config(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, state_size=8, head_dim=8, num_heads=8, n_groups=2,
        expand=2, chunk_size=8, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Mamba2ForCausalLM(config)

    def weights(state: State) -> Weights:
        yield from shared_names(state, "backbone.norm_f", "backbone.embeddings.weight", None)
        for layer in range(2):
            yield f"layers.{layer}.norm.weight", state[f"backbone.layers.{layer}.norm.weight"]
            yield from mamba2_weights(state, f"backbone.layers.{layer}.mixer", f"layers.{layer}.branches.m")

    m = {"state_size": 8, "head_dim": 8, "groups": 2, "chunk": 16}
    assert_same(theirs, {"pattern": "2*m", "width": WIDTH, "blocks": {"m": m}}, weights)


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

    def weights(state: State) -> Weights:
        yield from shared_names(state, "model.final_layernorm", "model.embed_tokens.weight", None)
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
    assert_same(theirs, {"pattern": "m gm m 2*gm", "width": WIDTH, "blocks": blocks}, weights)


@pytest.mark.parametrize("before", [False, True], ids=["norm of the gated", "gate of the normed"])
def test_falcon_h1_runs_attention_beside_mamba2(before):
    config = transformers.FalconH1Config(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=44, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=2,
        mamba_chunk_size=8, mamba_rms_norm=True, mamba_norm_before_gate=before, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    theirs = transformers.FalconH1ForCausalLM(config)

    def weights(state: State) -> Weights:
        yield from shared_names(state, "model.final_layernorm", "model.embed_tokens.weight", "lm_head.weight")
        for layer in range(2):
            mixers, mlp, old = f"layers.{2 * layer}", f"layers.{2 * layer + 1}", f"model.layers.{layer}"
            yield f"{mixers}.norm.weight", state[f"{old}.input_layernorm.weight"]
            yield f"{mlp}.norm.weight", state[f"{old}.pre_ff_layernorm.weight"]
            qkv = [state[f"{old}.self_attn.{name}_proj.weight"] for name in "qkv"]
            yield f"{mixers}.branches.a.qkv.weight", torch.cat(qkv)
            yield f"{mixers}.branches.a.out.weight", state[f"{old}.self_attn.o_proj.weight"]
            yield from mamba2_weights(state, f"{old}.mamba", f"{mixers}.branches.m")
            gate_up = [state[f"{old}.feed_forward.{name}_proj.weight"] for name in ("gate", "up")]
            yield f"{mlp}.branches.d.up.weight", torch.cat(gate_up)
            yield f"{mlp}.branches.d.down.weight", state[f"{old}.feed_forward.down_proj.weight"]

    arch = {
        "pattern": "2*((a|m) d)",
        "width": WIDTH,
        "tie_embeddings": False,
        "blocks": {
            "a": {"heads": 4, "kv_heads": 2},
            "m": {"state_size": 8, "head_dim": 8, "groups": 2, "chunk": 16, "norm_before_gate": before},
            "d": {"width": 44},
        },
    }
    assert_same(theirs, arch, weights)
