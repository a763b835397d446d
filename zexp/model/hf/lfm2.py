"""LFM2 (`transformers` modeling_lfm2): N·((c or a) d), queries and keys normed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from zexp.model.hf import pieces
from zexp.model.hf.entries import Always, Config, Fixed, Flat, Rope, Same, Unreadable
from zexp.model.hf.family import Family, Layer, Parts, count, some_attention
from zexp.model.hf.llama import ends, gqa, head_dim, trunk
from zexp.model.hf.pieces import Piece

KINDS = {"c": "conv", "a": "full_attention"}


def layers(theirs: Sequence[Layer]) -> dict[str, Any]:
    return {"num_hidden_layers": len(theirs), "layer_types": [KINDS[mixer] for mixer, _ in theirs]}


def unlayers(config: Config) -> list[Layer]:
    said = config.get("layer_types")
    if said is None:
        everywhere = range(count(config))
        attention = config.get("full_attn_idxs")
        return [
            ("a" if index in (everywhere if attention is None else attention) else "c", "d") for index in everywhere
        ]
    back = {theirs: ours for ours, theirs in KINDS.items()}
    if strange := sorted(set(said) - set(back)):
        raise Unreadable(f"layer_types has {', '.join(strange)}: zexp knows {', '.join(back)}.")
    return [(back[kind], "d") for kind in said]


class MlpWidth(Same):
    """The MLP's width: as it stands there, or made of it by block_auto_adjust_ff_dim."""

    def write(self, flat: Flat) -> dict[str, Any]:
        return {**super().write(flat), "block_auto_adjust_ff_dim": False}

    def read(self, config: Config) -> Flat:
        width = int(config.get("block_ff_dim", config.get(self.theirs, 12288)))
        if config.get("block_auto_adjust_ff_dim", True):
            width = 2 * width // 3
            factor, multiple = config.get("block_ffn_dim_multiplier", 1.0), config.get("block_multiple_of", 256)
            if factor is not None:
                width = -(-int(factor * width) // multiple) * multiple
        return {self.path: width}


class Tied(Same):
    """tie_word_embeddings, in older files tie_embedding."""

    def read(self, config: Config) -> Flat:
        return {self.path: bool(config.get("tie_embedding", config.get(self.theirs, True)))}


def tensors(parts: Parts) -> Iterator[Piece]:
    yield from ends(parts, "model.embed_tokens", "model.embedding_norm")
    width, specs = parts.width, parts.specs
    for index in range(len(parts.layers) // 2):
        mixer, after, old = 2 * index, 2 * index + 1, f"model.layers.{index}"
        yield from pieces.norm(f"layers.{mixer}.norm", f"{old}.operator_norm", "rmsnorm", width)
        yield from pieces.norm(f"layers.{after}.norm", f"{old}.ffn_norm", "rmsnorm", width)
        if parts.layers[mixer] == "a":
            ours, a = f"layers.{mixer}.branches.a", specs["a"]
            yield from pieces.attention(ours, f"{old}.self_attn", a, width, out="out_proj")
            for name in "qk":
                yield pieces.same(f"{ours}.{name}_norm.weight", f"{old}.self_attn.{name}_layernorm.weight", a.head_dim)
        else:
            yield from _short_conv(f"layers.{mixer}.branches.c", f"{old}.conv", width, specs["c"])
        names = {"gate": "w1", "up": "w3", "down": "w2"}
        yield from pieces.mlp(f"layers.{after}.branches.d", f"{old}.feed_forward", specs["d"], width, **names)


def _short_conv(ours: str, theirs: str, width: int, spec: Any) -> Iterator[Piece]:
    for name, rows in (("in_proj", 3 * width), ("out_proj", width)):
        yield pieces.same(f"{ours}.{name}.weight", f"{theirs}.{name}.weight", rows, width)
        if spec.bias:
            yield pieces.same(f"{ours}.{name}.bias", f"{theirs}.{name}.bias", rows)
    yield pieces.same(f"{ours}.conv_weight", f"{theirs}.conv.weight", width, 1, spec.conv_width)
    if spec.bias:
        yield pieces.same(f"{ours}.conv_bias", f"{theirs}.conv.bias", width)


FAMILY = Family(
    model_type="lfm2",
    class_name="Lfm2ForCausalLM",
    unit=(("c", "a"), ("d",)),
    entries=(
        *trunk(eps=1e-5, tied=True, eps_key="norm_eps")[:3],
        Tied("tie_word_embeddings", "tie_embeddings"),
        Always("norm.kind", "rmsnorm"),
        Same("conv_L_cache", "blocks.c.conv_width", 3),
        Same("conv_bias", "blocks.c.bias", False),
        *gqa("a", kv_heads=8),
        Same("head_dim", "blocks.a.head_dim", head_dim),
        Rope("a", 1_000_000.0),
        Always("blocks.a.qk_norm", True),
        MlpWidth("intermediate_size", "blocks.d.width"),
        Always("blocks.d.activation", "swiglu"),
        Fixed("attention_dropout", 0.0),
    ),
    layers=layers,
    unlayers=unlayers,
    tensors=tensors,
    limits=some_attention,
)
