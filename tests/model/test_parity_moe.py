"""Mixtures of experts against `transformers`': whole models, and MoE layers alone where their models have other parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from zexp.blocks.context import Context
from zexp.blocks.layer import Place
from zexp.blocks.moe.layer import Layer
from zexp.blocks.moe.spec import Spec

transformers = pytest.importorskip("transformers", reason="parity needs the extra zexp[hf]")

from tests.model.test_parity_transformers import (  # noqa: E402
    LLAMA,
    WIDTH,
    State,
    Weights,
    assert_same,
    llama_weights,
    shared_names,
)


def expert_weights(state: State, old: str, new: str, router: str = "gate") -> Weights:
    """transformers holds the experts of a layer as we do: (E, 2F, D), the gate's rows first, and (E, D, F)."""
    yield f"{new}.router.weight", state[f"{old}.{router}.weight"]
    yield f"{new}.up", state[f"{old}.experts.gate_up_proj"]
    yield f"{new}.down", state[f"{old}.experts.down_proj"]


def shared_weights(state: State, old: str, new: str, name: str = "shared_expert") -> Weights:
    gate_up = [state[f"{old}.{name}.{part}_proj.weight"] for part in ("gate", "up")]
    yield f"{new}.shared_up.weight", torch.cat(gate_up)
    yield f"{new}.shared_down.weight", state[f"{old}.{name}.down_proj.weight"]
    if f"{old}.{name}_gate.weight" in state:
        yield f"{new}.shared_gate.weight", state[f"{old}.{name}_gate.weight"]


def test_mixtral():
    config = transformers.MixtralConfig(
        **LLAMA, num_key_value_heads=2, num_local_experts=5, num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    theirs = transformers.MixtralForCausalLM(config)

    def weights(state: State) -> Weights:
        yield from llama_weights(state, 2, head=True)
        for layer in range(2):
            yield from expert_weights(state, f"model.layers.{layer}.mlp", f"layers.{2 * layer + 1}.branches.e")

    blocks = {"a": {"heads": 4, "kv_heads": 2, "rope_theta": 1e6}, "e": {"width": 44, "experts": 5}}
    assert_same(theirs, {"pattern": "2*(a e)", "width": WIDTH, "tie_embeddings": False, "blocks": blocks}, weights)


def test_mixtral_balances_by_the_same_loss():
    config = transformers.MixtralConfig(**LLAMA | {"num_hidden_layers": 1}, num_local_experts=5, num_experts_per_tok=3)
    block = transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock(config)
    spec = Spec(width=44, experts=5, top_k=3, aux_loss=1.0)
    x = torch.randn(1, 29, WIDTH)
    ours = loaded(spec, block, lambda state: expert_weights(state, "theirs", "ours"))
    auxiliary: list[torch.Tensor] = []
    ours(x, Context(auxiliary=auxiliary))
    logits = block.gate(x)[0]
    theirs = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func((logits,), 5, 3)
    # Theirs is a mean over the tokens and grows with K, which ours is divided by.
    torch.testing.assert_close(auxiliary[0] / 29, theirs / 3)
    theirs.backward()
    (auxiliary[0] / 29 * 3).backward()
    torch.testing.assert_close(ours.router.weight.grad, block.gate.weight.grad)


def test_jamba_does_not_normalise():
    # Its Mamba layers are tested by the block r: here every layer is attention, without positions, and every second MoE.
    config = transformers.JambaConfig(
        **LLAMA | {"num_hidden_layers": 4}, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        attn_layer_period=1, attn_layer_offset=0, use_mamba_kernels=False,
    )  # fmt: skip
    theirs = transformers.JambaForCausalLM(config)

    def weights(state: State) -> Weights:
        yield from shared_names(state, "model.final_layernorm", "model.embed_tokens.weight", "lm_head.weight")
        for layer in range(4):
            mixer, channel, old = f"layers.{2 * layer}", f"layers.{2 * layer + 1}", f"model.layers.{layer}"
            yield f"{mixer}.norm.weight", state[f"{old}.input_layernorm.weight"]
            yield f"{channel}.norm.weight", state[f"{old}.pre_ff_layernorm.weight"]
            qkv = [state[f"{old}.self_attn.{name}_proj.weight"] for name in "qkv"]
            yield f"{mixer}.branches.a.qkv.weight", torch.cat(qkv)
            yield f"{mixer}.branches.a.out.weight", state[f"{old}.self_attn.o_proj.weight"]
            if layer % 2:
                yield from expert_weights(state, f"{old}.feed_forward", f"{channel}.branches.e", router="router")
            else:
                gate_up = [state[f"{old}.feed_forward.{name}_proj.weight"] for name in ("gate", "up")]
                yield f"{channel}.branches.d.up.weight", torch.cat(gate_up)
                yield f"{channel}.branches.d.down.weight", state[f"{old}.feed_forward.down_proj.weight"]

    blocks = {
        "a": {"heads": 4, "kv_heads": 2, "rope_theta": None},
        "d": {"width": 44},
        "e": {"width": 44, "experts": 4, "normalise": False},
    }
    assert_same(theirs, {"pattern": "2*(a d a e)", "width": WIDTH, "tie_embeddings": False, "blocks": blocks}, weights)


def test_qwen2_moe_gates_its_shared_expert():
    config = transformers.Qwen2MoeConfig(
        **LLAMA, num_key_value_heads=2, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20,
        shared_expert_intermediate_size=28, norm_topk_prob=False, qkv_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    theirs = transformers.Qwen2MoeForCausalLM(config)

    def weights(state: State) -> Weights:
        yield from llama_weights(state, 2, head=True)
        for layer in range(2):
            old, new = f"model.layers.{layer}.mlp", f"layers.{2 * layer + 1}.branches.e"
            yield from expert_weights(state, old, new)
            yield from shared_weights(state, old, new)

    e = {"width": 20, "experts": 6, "top_k": 3, "normalise": False, "shared_width": 28, "shared_gate": True}
    blocks = {"a": {"heads": 4, "kv_heads": 2, "qkv_bias": True}, "e": e}
    assert_same(theirs, {"pattern": "2*(a e)", "width": WIDTH, "tie_embeddings": False, "blocks": blocks}, weights)


# ---- MoE layers alone ----


def loaded(spec: Spec, theirs: torch.nn.Module, weights: Any, dtype: torch.dtype = torch.float32) -> Layer:
    """Our layer with the weights of theirs, which are drawn anew."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    ours = Layer(spec.completed(WIDTH), WIDTH, 1e-5, Place(0, 1))
    named = {f"theirs.{name}": parameter for name, parameter in theirs.named_parameters()}
    state = {name.removeprefix("ours."): tensor for name, tensor in weights(named)}
    result = ours.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= {"choice_bias"}
    return ours


def assert_same_layer(spec: Spec, theirs: torch.nn.Module, weights: Any, buffers: Mapping[str, torch.Tensor]) -> None:
    ours = loaded(spec, theirs, weights)
    for name, buffer in buffers.items():
        ours.get_buffer(name).copy_(buffer)
    x = torch.randn(2, 37, WIDTH, generator=torch.Generator().manual_seed(1))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    mine, true = ours(inputs[0], Context()), theirs(inputs[1])
    assert true.std() > 0.5
    assert (mine - true).abs().max() < 1e-4 * true.abs().max()
    dout = torch.randn(true.shape, generator=torch.Generator().manual_seed(2))
    (mine * dout).sum().backward()
    (true * dout).sum().backward()
    gradients = {f"theirs.{name}": p.grad for name, p in theirs.named_parameters()}
    pairs = [(ours.get_parameter(name.removeprefix("ours.")).grad, grad) for name, grad in weights(gradients)]
    for mine, true in [*pairs, (inputs[0].grad, inputs[1].grad)]:
        assert (mine - true).abs().max() < 1e-3 * true.abs().max()


def test_qwen3_next():
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

    config = transformers.Qwen3NextConfig(
        hidden_size=WIDTH, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=20, norm_topk_prob=True,
        shared_expert_intermediate_size=28,
    )  # fmt: skip
    config._experts_implementation = "eager"
    spec = Spec(width=20, experts=8, top_k=3, shared_width=28, shared_gate=True)

    def weights(state: State) -> Weights:
        yield from expert_weights(state, "theirs", "ours")
        yield from shared_weights(state, "theirs", "ours")

    assert_same_layer(spec, Qwen3NextSparseMoeBlock(config), weights, {})


def test_deepseek_v3_chooses_with_a_bias_and_weighs_without():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = transformers.DeepseekV3Config(
        hidden_size=WIDTH, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=20, n_shared_experts=2,
        n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    config._experts_implementation = "eager"
    theirs = DeepseekV3MoE(config)
    bias = torch.linspace(-0.4, 0.4, 8)
    theirs.gate.e_score_correction_bias.copy_(bias)
    spec = Spec(width=20, experts=8, top_k=3, router="sigmoid", routed_scale=2.5, bias_rate=0.001, shared_width=40)

    def weights(state: State) -> Weights:
        yield from expert_weights(state, "theirs", "ours")
        yield from shared_weights(state, "theirs", "ours", name="shared_experts")

    assert_same_layer(spec, theirs, weights, {"choice_bias": bias})
