"""Nemotron-H (`transformers` modeling_nemotron_h): Megatron's pattern, layers of m, a, d and e in any order.

dt: as in Zamba2 (zamba2.py), `transformers` clamps it at time_step_min in full passes whatever time_step_limit says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from zexp.model.hf import pieces
from zexp.model.hf.entries import Always, Config, Fixed, Same, TimeStepMin, Unreadable
from zexp.model.hf.family import FREE, Family, Layer, Parts, some_attention
from zexp.model.hf.llama import ends, gqa, trunk
from zexp.model.hf.mamba2 import Heads, block
from zexp.model.hf.pieces import Piece
from zexp.model.hf.zamba2 import OLD_NAMES

KINDS = {"m": "linear_attention", "a": "full_attention", "d": "mlp", "e": "moe"}
LETTERS = {"M": "m", "*": "a", "-": "d", "E": "e"}  # of hybrid_override_pattern, in older files
PLAIN = {"relu2": "relu2", "relu": "relu", "silu": "silu", "gelu_erf": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def layers(theirs: Sequence[Layer]) -> dict[str, Any]:
    return {"num_hidden_layers": len(theirs), "layers_block_type": [KINDS[layer] for (layer,) in theirs]}


def unlayers(config: Config) -> list[Layer]:
    said = config.get("layers_block_type") or config.get("layer_types")
    if said is None:
        written = config.get("hybrid_override_pattern")
        if not written or set(written) - set(LETTERS):
            raise Unreadable(
                f"hybrid_override_pattern = {written!r} and no layers_block_type: M, *, - and E are expected."
            )
        return [(LETTERS[char],) for char in written]
    back = {theirs: ours for ours, theirs in KINDS.items()}
    names = [OLD_NAMES.get(kind, kind) for kind in said]
    if strange := sorted(set(names) - set(back)):
        raise Unreadable(f"layers_block_type has {', '.join(strange)}: zexp knows {', '.join(back)}.")
    return [(back[name],) for name in names]


class MambaHeads(Same):
    """Heads times their width is the inner width, whatever `expand` says; ours is a multiple of the model's width."""

    def read(self, config: Config) -> dict[str, Any]:
        inner = int(config.get("mamba_num_heads", 128)) * int(config.get("mamba_head_dim", 64))
        expand, rest = divmod(inner, int(config["hidden_size"]))
        if rest or not expand:
            raise Unreadable(
                f"mamba_num_heads · mamba_head_dim = {inner} is no multiple of hidden_size = {config['hidden_size']}."
            )
        return {self.path: expand}


def tensors(parts: Parts) -> Iterator[Piece]:
    yield from ends(parts, "backbone.embeddings", "backbone.norm_f")
    width = parts.width
    for index, letter in enumerate(parts.layers):
        ours, old, spec = f"layers.{index}.branches.{letter}", f"backbone.layers.{index}", parts.specs[letter]
        yield from pieces.norm(f"layers.{index}.norm", f"{old}.norm", "rmsnorm", width)
        if letter == "m":
            yield from pieces.mamba2(ours, f"{old}.mixer", spec, width)
        elif letter == "a":
            yield from pieces.attention(ours, f"{old}.mixer", spec, width)
        elif letter == "d":
            yield from pieces.mlp(ours, f"{old}.mixer", spec, width)
        else:
            yield from pieces.experts(ours, f"{old}.mixer", spec, width, up=("up_proj",))
            yield pieces.same(f"{ours}.choice_bias", f"{old}.mixer.gate.e_score_correction_bias", spec.experts)
            for name in ("up", "down"):
                shape = (spec.shared_width, width) if name == "up" else (width, spec.shared_width)
                yield pieces.same(
                    f"{ours}.shared_{name}.weight", f"{old}.mixer.shared_experts.{name}_proj.weight", *shape
                )


def limits(parts: Parts) -> list[str]:
    """It needs attention; its experts are chosen with a bias each, beside a shared one."""
    found = some_attention(parts)
    spec = parts.specs.get("e")
    if spec is None:
        return found
    if spec.bias_rate == 0:
        found.append(
            "arch.blocks.e.bias_rate = 0.0: a NemotronHForCausalLM chooses experts with a bias each; set it above 0."
        )
    if spec.shared_width == 0:
        found.append("arch.blocks.e.shared_width = 0: a NemotronHForCausalLM has a shared expert beside the others.")
    return found


NAMES = {
    "expand": "expand",
    "state_size": "ssm_state_size",
    "groups": "n_groups",
    "conv_width": "conv_kernel",
    "chunk": "chunk_size",
}

FAMILY = Family(
    model_type="nemotron_h",
    class_name="NemotronHForCausalLM",
    unit=(("m", "a", "d", "e"),),
    entries=(
        *trunk(eps=1e-5, tied=False, eps_key="layer_norm_epsilon"),
        *block(NAMES, state_size=128, groups=8, chunk=128),
        MambaHeads("expand", "blocks.m.expand"),
        Same("mamba_head_dim", "blocks.m.head_dim", 64),
        Heads("mamba_num_heads"),
        TimeStepMin(),
        *gqa("a", kv_heads=8),
        Same("head_dim", "blocks.a.head_dim", 128),
        Always("blocks.a.rope_theta", None),
        Same("intermediate_size", "blocks.d.width", 21504),
        Same("mlp_hidden_act", "blocks.d.activation", "relu2", values=PLAIN),
        Same("mlp_bias", "blocks.d.bias", False),
        Same("moe_intermediate_size", "blocks.e.width", 7688),
        Same("n_routed_experts", "blocks.e.experts", 8),
        Same("num_experts_per_tok", "blocks.e.top_k", 2),
        Same("mlp_hidden_act", "blocks.e.activation", "relu2", values=PLAIN),
        Same("norm_topk_prob", "blocks.e.normalise", True),
        Same("routed_scaling_factor", "blocks.e.routed_scale", 1.0),
        Same("moe_shared_expert_intermediate_size", "blocks.e.shared_width", 7688),
        Always("blocks.e.router", "sigmoid"),
        Always("blocks.e.bias_rate", 0.001),
        Fixed("moe_latent_size", None),
        Fixed("n_group", 1),
        Fixed("topk_group", 1),
        Fixed("num_nextn_predict_layers", 0),
        Fixed("mamba_hidden_act", "silu"),
        Fixed("use_bias", False),
        Fixed("use_conv_bias", True),
        Fixed("mamba_proj_bias", False),
        Fixed("attention_bias", False),
        Fixed("attention_dropout", 0.0),
        Fixed("sliding_window", None),
    ),
    layers=layers,
    unlayers=unlayers,
    tensors=tensors,
    limits=limits,
    free=FREE | {"blocks.e.bias_rate"},  # how fast the biases move in training; that there are some, `limits` says
    tolerated={"blocks.m.dt_min": (None,)},
)
