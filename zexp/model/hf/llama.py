"""Llama (`transformers` modeling_llama): N·(a d)."""

from __future__ import annotations

from collections.abc import Iterator

from zexp.model.hf import pieces
from zexp.model.hf.entries import Always, Config, Entry, Fixed, Rope, Same
from zexp.model.hf.family import Family, Parts, counted
from zexp.model.hf.pieces import Piece

GATED = {"swiglu": "silu", "geglu_erf": "gelu", "geglu_tanh": "gelu_pytorch_tanh", "reglu": "relu"}


def heads(config: Config) -> int:
    return int(config["num_attention_heads"])


def head_dim(config: Config) -> int:
    return int(config["hidden_size"]) // heads(config)


def trunk(eps: float, tied: bool, eps_key: str = "rms_norm_eps") -> tuple[Entry, ...]:
    """What stands around the layers. eps, tied: the family's defaults."""
    return (
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "width"),
        Same(eps_key, "norm.eps", eps),
        Same("tie_word_embeddings", "tie_embeddings", tied),
        Always("norm.kind", "rmsnorm"),
    )


def gqa(letter: str, kv_heads: int | None = None) -> tuple[Entry, ...]:
    """Heads of attention. kv_heads: where the key is not there; None, and null in the file, = as many as heads."""

    def default(config: Config) -> int:
        return heads(config) if kv_heads is None or "num_key_value_heads" in config else kv_heads

    at = f"blocks.{letter}."
    return (Same("num_attention_heads", at + "heads"), Same("num_key_value_heads", at + "kv_heads", default))


def ends(parts: Parts, embedding: str, final: str, head: str = "lm_head") -> Iterator[Piece]:
    """The embedding, the final norm and the head; a tied head may stand in the file once more."""
    shape = (parts.vocab_size, parts.width)
    tied = parts.stack.tie_embeddings
    also = (f"{head}.weight",) if tied else ()
    yield pieces.same("embedding.weight", f"{embedding}.weight", *shape, also=also)
    yield from pieces.norm("norm", final, parts.stack.norm.kind, parts.width)
    if not tied:
        yield pieces.same("head.weight", f"{head}.weight", *shape)


def layer(parts: Parts, index: int) -> Iterator[Piece]:
    """Layer `index` of theirs: attention, whatever its letter, and the MLP if it has one."""
    mixer, after, old = 2 * index, 2 * index + 1, f"model.layers.{index}"
    letter = parts.layers[mixer]
    width = parts.width
    yield from pieces.norm(f"layers.{mixer}.norm", f"{old}.input_layernorm", "rmsnorm", width)
    yield from pieces.norm(f"layers.{after}.norm", f"{old}.post_attention_layernorm", "rmsnorm", width)
    yield from pieces.attention(f"layers.{mixer}.branches.{letter}", f"{old}.self_attn", parts.specs[letter], width)
    if parts.layers[after] == "d":
        yield from pieces.mlp(f"layers.{after}.branches.d", f"{old}.mlp", parts.specs["d"], width)


def tensors(parts: Parts) -> Iterator[Piece]:
    yield from ends(parts, "model.embed_tokens", "model.norm")
    for index in range(len(parts.layers) // 2):
        yield from layer(parts, index)


def divided(parts: Parts) -> list[str]:
    """LlamaConfig refuses a width that the heads do not divide, also where head_dim is given."""
    count = parts.specs["a"].heads
    if parts.width % count == 0:
        return []
    return [f"arch.blocks.a.heads = {count}: a LlamaForCausalLM takes divisors of the width {parts.width} only."]


_layers, _unlayers = counted(("a", "d"))

FAMILY = Family(
    model_type="llama",
    class_name="LlamaForCausalLM",
    unit=(("a",), ("d",)),
    entries=(
        *trunk(eps=1e-6, tied=False),
        *gqa("a"),
        Same("head_dim", "blocks.a.head_dim", head_dim),
        Same("attention_bias", "blocks.a.bias", False),
        Rope("a"),
        Same("intermediate_size", "blocks.d.width"),
        Same("hidden_act", "blocks.d.activation", "silu", values=GATED),
        Same("mlp_bias", "blocks.d.bias", False),
        Fixed("attention_dropout", 0.0),
    ),
    layers=_layers,
    unlayers=_unlayers,
    tensors=tensors,
    limits=divided,
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
