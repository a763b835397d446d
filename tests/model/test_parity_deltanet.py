"""Gated DeltaNet against `transformers`': Qwen3-Next whole, OLMo-Hybrid's mixer alone."""

from __future__ import annotations

import pytest
import torch

from zexp.blocks.context import Context
from zexp.blocks.gated_deltanet.layer import Layer
from zexp.blocks.gated_deltanet.spec import Spec
from zexp.blocks.layer import Place

transformers = pytest.importorskip("transformers", reason="parity needs the extra zexp[hf]")

from tests.model.test_parity_moe import expert_weights, shared_weights  # noqa: E402
from tests.model.test_parity_transformers import LENGTH, VOCAB, WIDTH, State, Weights, assert_same  # noqa: E402


def spread(theirs: torch.nn.Module) -> None:
    """Convolutions and decays that leave something of values and states; the library's own leave little of either."""
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "conv1d" in name:
                parameter.uniform_(-0.5, 0.5)
            elif "A_log" in name:
                parameter.uniform_(-4, 0)
            elif "dt_bias" in name:
                parameter.uniform_(-2, 1)


def plus_one(tensor: torch.Tensor) -> torch.Tensor:
    """Our norms' weight from Qwen3-Next's, which is less 1. A gradient (no nn.Parameter) is the same for both."""
    return tensor + 1 if isinstance(tensor, torch.nn.Parameter) else tensor


def by_key_head(rows: torch.Tensor, heads: int, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """Their rows go key head by key head (its query, its key, its values, its gates, ...); ours are all queries, ..."""
    return [part.flatten(0, 1) for part in rows.unflatten(0, (heads, -1)).split(sizes, dim=1)]


@pytest.mark.parametrize(("key_heads", "value_heads"), [(2, 4), (3, 3)], ids=str)
def test_qwen3_next(key_heads, value_heads):
    config = transformers.Qwen3NextConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=4, full_attention_interval=2, intermediate_size=44,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=False,
        linear_num_key_heads=key_heads, linear_num_value_heads=value_heads, linear_key_head_dim=6,
        linear_value_head_dim=8, linear_conv_kernel_dim=3, mlp_only_layers=[0, 1, 3], num_experts=6,
        num_experts_per_tok=2, moe_intermediate_size=20, shared_expert_intermediate_size=28,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    )  # fmt: skip
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    theirs = transformers.Qwen3NextForCausalLM(config)
    spread(theirs)
    shared = value_heads // key_heads

    def weights(state: State) -> Weights:
        yield "embedding.weight", state["model.embed_tokens.weight"]
        yield "head.weight", state["lm_head.weight"]
        yield "norm.weight", plus_one(state["model.norm.weight"])
        for layer in range(4):
            mixer, channel, old = f"layers.{2 * layer}", f"layers.{2 * layer + 1}", f"model.layers.{layer}"
            yield f"{mixer}.norm.weight", plus_one(state[f"{old}.input_layernorm.weight"])
            yield f"{channel}.norm.weight", plus_one(state[f"{old}.post_attention_layernorm.weight"])
            if layer % 2:
                q, gate = state[f"{old}.self_attn.q_proj.weight"].unflatten(0, (4, 2, 16)).unbind(1)
                k, v = (state[f"{old}.self_attn.{name}_proj.weight"] for name in "kv")
                yield f"{mixer}.branches.a.qkv.weight", torch.cat((q.flatten(0, 1), k, v, gate.flatten(0, 1)))
                yield f"{mixer}.branches.a.out.weight", state[f"{old}.self_attn.o_proj.weight"]
                for name in "qk":
                    norm = state[f"{old}.self_attn.{name}_norm.weight"]
                    yield f"{mixer}.branches.a.{name}_norm.weight", plus_one(norm)
            else:
                qkvz, ba = (state[f"{old}.linear_attn.in_proj_{name}.weight"] for name in ("qkvz", "ba"))
                b, a = by_key_head(ba, key_heads, (shared, shared))
                qkvz = by_key_head(qkvz, key_heads, (6, 6, shared * 8, shared * 8))
                yield f"{mixer}.branches.l.in_proj.weight", torch.cat((*qkvz, a, b))
                yield from mixer_weights(state, f"{old}.linear_attn", f"{mixer}.branches.l", "norm", "out_proj")
            if layer == 2:
                yield from expert_weights(state, f"{old}.mlp", f"{channel}.branches.e")
                yield from shared_weights(state, f"{old}.mlp", f"{channel}.branches.e")
            else:
                gate_up = [state[f"{old}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
                yield f"{channel}.branches.d.up.weight", torch.cat(gate_up)
                yield f"{channel}.branches.d.down.weight", state[f"{old}.mlp.down_proj.weight"]

    arch = {
        "pattern": "l d a d l e a d",
        "width": WIDTH,
        "tie_embeddings": False,
        "blocks": {
            "l": {
                "key_heads": key_heads, "value_heads": value_heads, "key_head_dim": 6, "value_head_dim": 8,
                "conv_width": 3, "chunk": 16,
            },
            "a": {
                "heads": 4, "kv_heads": 2, "head_dim": 16, "rope_theta": 1e7, "rope_fraction": 0.25, "qk_norm": True,
                "output_gate": True,
            },
            "d": {"width": 44},
            "e": {"width": 20, "experts": 6, "top_k": 2, "shared_width": 28, "shared_gate": True},
        },
    }  # fmt: skip
    assert_same(theirs, arch, weights)


def mixer_weights(state: State, theirs: str, ours: str, norm: str, out: str) -> Weights:
    for name in ("A_log", "dt_bias"):
        yield f"{ours}.{name}", state[f"{theirs}.{name}"]
    yield f"{ours}.conv_weight", state[f"{theirs}.conv1d.weight"].squeeze(1)
    yield f"{ours}.norm_weight", state[f"{theirs}.{norm}.weight"]
    yield f"{ours}.out_proj.weight", state[f"{theirs}.{out}.weight"]


@pytest.mark.parametrize("negative", [False, True], ids=["beta below 1", "negative eigenvalues"])
def test_olmo_hybrid(negative):
    # The mixer alone: their attention layers norm what a layer writes, which no pattern of ours says.
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

    config = transformers.OlmoHybridConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, linear_allow_neg_eigval=negative,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = OlmoHybridGatedDeltaNet(config, layer_idx=0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    spread(theirs)

    def weights(state: State) -> Weights:
        rows = [state[f"theirs.{name}_proj.weight"] for name in "qkvgab"]
        yield "ours.in_proj.weight", torch.cat(rows)
        yield from mixer_weights(state, "theirs", "ours", "o_norm", "o_proj")

    spec = Spec(key_heads=2, negative_eigenvalues=negative, chunk=16)
    ours = Layer(spec.completed(WIDTH), WIDTH, 1e-5, Place(0, 1))  # their norm's eps is 1e-5, whatever the model's
    named = {f"theirs.{name}": parameter for name, parameter in theirs.named_parameters()}
    ours.load_state_dict({name.removeprefix("ours."): tensor for name, tensor in weights(named)})
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    mine, true = ours(inputs[0], Context()), theirs(inputs[1])
    assert true.std() > 0.1
    assert (mine - true).abs().max() < 1e-4 * true.abs().max()
    dout = torch.randn(true.shape, generator=torch.Generator().manual_seed(2))
    (mine * dout).sum().backward()
    (true * dout).sum().backward()
    gradients = {f"theirs.{name}": parameter.grad for name, parameter in theirs.named_parameters()}
    pairs = [(ours.get_parameter(name.removeprefix("ours.")).grad, grad) for name, grad in weights(gradients)]
    for mine, true in [*pairs, (inputs[0].grad, inputs[1].grad)]:
        assert (mine - true).abs().max() < 1e-3 * true.abs().max()
