"""GPT-NeoX, so Pythia (`transformers` modeling_gpt_neox): N·(a|d) with a norm for each branch, or N·(a d)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from zexp.model.hf import pieces
from zexp.model.hf.entries import Always, Config, Fixed, Rope, Same, Unreadable
from zexp.model.hf.family import Family, Layer, Parts, count
from zexp.model.hf.llama import ends
from zexp.model.hf.pieces import Piece, Theirs

PLAIN = {"gelu_erf": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu", "relu2": "relu2"}


def tensors(parts: Parts) -> Iterator[Piece]:
    yield from ends(parts, "gpt_neox.embed_in", "gpt_neox.final_layer_norm", head="embed_out")
    a, d, width = parts.specs["a"], parts.specs["d"], parts.width
    parallel = "(a|d)" in parts.layers
    for index in range(len(parts.layers) // (1 if parallel else 2)):
        old = f"gpt_neox.layers.{index}"
        first, second = (index, index) if parallel else (2 * index, 2 * index + 1)
        norms = ("norms.a", "norms.d") if parallel else ("norm", "norm")
        yield from pieces.norm(f"layers.{first}.{norms[0]}", f"{old}.input_layernorm", "layernorm", width)
        yield from pieces.norm(f"layers.{second}.{norms[1]}", f"{old}.post_attention_layernorm", "layernorm", width)
        attention, qkv = f"layers.{first}.branches.a", f"{old}.attention.query_key_value"
        by_head = (a.heads, 3)  # their rows: q, k and v of the first head, then of the next
        yield Piece(f"{attention}.qkv.weight", (Theirs(f"{qkv}.weight", (3 * width, width)),), by_head)
        yield pieces.same(f"{attention}.out.weight", f"{old}.attention.dense.weight", width, width)
        if a.bias:
            yield Piece(f"{attention}.qkv.bias", (Theirs(f"{qkv}.bias", (3 * width,)),), by_head)
            yield pieces.same(f"{attention}.out.bias", f"{old}.attention.dense.bias", width)
        names = {"up": "dense_h_to_4h", "down": "dense_4h_to_h"}
        yield from pieces.mlp(f"layers.{second}.branches.d", f"{old}.mlp", d, width, **names)


def layers(theirs: Sequence[Layer]) -> dict[str, Any]:
    return {"num_hidden_layers": len(theirs)}


def _family(parallel: bool) -> Family:
    unit: Layer = ("(a|d)",) if parallel else ("a", "d")

    def unlayers(config: Config) -> list[Layer]:
        if bool(config.get("use_parallel_residual", True)) != parallel:
            raise Unreadable("use_parallel_residual does not fit.")
        return [unit] * count(config)

    return Family(
        model_type="gpt_neox",
        class_name="GPTNeoXForCausalLM",
        unit=tuple((one,) for one in unit),
        entries=(
            Same("vocab_size", "vocab_size"),
            Same("hidden_size", "width"),
            Same("layer_norm_eps", "norm.eps", 1e-5),
            Same("tie_word_embeddings", "tie_embeddings", False),
            Always("norm.kind", "layernorm"),
            *((Always("parallel.norms", "separate"),) if parallel else ()),
            Same("num_attention_heads", "blocks.a.heads"),
            Same("attention_bias", "blocks.a.bias", True),
            Rope("a", fraction=0.25, old_theta="rotary_emb_base", old_fraction="rotary_pct"),
            Same("intermediate_size", "blocks.d.width"),
            Same("hidden_act", "blocks.d.activation", "gelu", values=PLAIN),
            Always("blocks.d.bias", True),
            Fixed("use_parallel_residual", parallel, True),
            Fixed("attention_dropout", 0.0),
            Fixed("hidden_dropout", 0.0),
        ),
        layers=layers,
        unlayers=unlayers,
        tensors=tensors,
        # Masks and frequencies that older versions stored.
        ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    )


FAMILIES = (_family(parallel=True), _family(parallel=False))
