"""Jamba (`transformers` modeling_jamba): N·((r or a) (d or e)), both choices at a fixed period."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from zexp.model.hf import pieces
from zexp.model.hf.entries import Always, Config, Fixed, Same, Unreadable
from zexp.model.hf.family import Family, Layer, Parts, count, some_attention
from zexp.model.hf.llama import ends, gqa, head_dim, trunk
from zexp.model.hf.mamba import block
from zexp.model.hf.pieces import Piece

SILU = {"swiglu": "silu"}  # the key is also for what follows Mamba's convolution


def layers(theirs: Sequence[Layer]) -> dict[str, Any]:
    attention, expert = ([layer[place] == letter for layer in theirs] for place, letter in ((0, "a"), (1, "e")))
    made: dict[str, Any] = {"num_hidden_layers": len(theirs)}
    for name, marks, what in (("attn", attention, "a"), ("expert", expert, "e")):
        period, offset = _period(marks, what)
        made |= {f"{name}_layer_period": period, f"{name}_layer_offset": offset}
    return made if any(expert) else {**made, "num_experts": 1}


def _period(marks: list[bool], letter: str) -> tuple[int, int]:
    """The smallest period and its offset at which the marks, and no others, are set."""
    for period in range(1, len(marks) + 2):
        for offset in range(period):
            if all(mark == (index % period == offset) for index, mark in enumerate(marks)):
                return period, offset
    raise Unreadable(f"the layers '{letter}' do not stand at one fixed distance, which is all that a Jamba can say.")


def unlayers(config: Config) -> list[Layer]:
    def at(index: int, name: str, period: int, offset: int) -> bool:
        return bool(index % config.get(f"{name}_layer_period", period) == config.get(f"{name}_layer_offset", offset))

    several = config.get("num_experts", 16) > 1
    return [
        ("a" if at(index, "attn", 8, 4) else "r", "e" if several and at(index, "expert", 2, 1) else "d")
        for index in range(count(config))
    ]


def tensors(parts: Parts) -> Iterator[Piece]:
    yield from ends(parts, "model.embed_tokens", "model.final_layernorm")
    width, specs = parts.width, parts.specs
    for index in range(len(parts.layers) // 2):
        mixer, after, old = 2 * index, 2 * index + 1, f"model.layers.{index}"
        yield from pieces.norm(f"layers.{mixer}.norm", f"{old}.input_layernorm", "rmsnorm", width)
        yield from pieces.norm(f"layers.{after}.norm", f"{old}.pre_ff_layernorm", "rmsnorm", width)
        if parts.layers[mixer] == "a":
            yield from pieces.attention(f"layers.{mixer}.branches.a", f"{old}.self_attn", specs["a"], width)
        else:
            yield from pieces.mamba1(f"layers.{mixer}.branches.r", f"{old}.mamba", specs["r"], width)
        channel, theirs = f"layers.{after}.branches.{parts.layers[after]}", f"{old}.feed_forward"
        if parts.layers[after] == "d":
            yield from pieces.mlp(channel, theirs, specs["d"], width)
        else:
            names = ("gate_proj", "up_proj")
            yield from pieces.experts(channel, theirs, specs["e"], width, router="router", up=names)


FAMILY = Family(
    model_type="jamba",
    class_name="JambaForCausalLM",
    unit=(("r", "a"), ("d", "e")),
    entries=(
        *trunk(eps=1e-6, tied=False),
        *block("mamba_"),
        Always("blocks.r.heads", 1),
        Always("blocks.r.inner_norms", True),
        *gqa("a", kv_heads=8),
        Same("head_dim", "blocks.a.head_dim", head_dim),
        Always("blocks.a.rope_theta", None),
        Same("intermediate_size", "blocks.d.width"),
        Same("hidden_act", "blocks.d.activation", "silu", values=SILU),
        Same("intermediate_size", "blocks.e.width"),
        Same("hidden_act", "blocks.e.activation", "silu", values=SILU),
        Same("num_experts", "blocks.e.experts", 16),
        Same("num_experts_per_tok", "blocks.e.top_k", 2),
        Always("blocks.e.normalise", False),
        Fixed("attention_dropout", 0.0),
    ),
    layers=layers,
    unlayers=unlayers,
    tensors=tensors,
    limits=some_attention,
)
