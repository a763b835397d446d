"""The tiny architectures of the quickstart, and a strategy for random ones."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

MAMBA2 = {"expand": 2, "state_size": 32, "head_dim": 32, "groups": 1, "conv_width": 4, "chunk": 64}
SHARED = {
    "copies": 1,
    "heads": 4,
    "mlp_width": 192,
    "activation": "gelu_erf",
    "concat_embeddings": True,
    "lora_rank": {"mlp": 8, "attention": 0},
    "call_linear": True,
    "rope_theta": None,
}
TINY: dict[str, dict[str, Any]] = {
    "zamba2_tiny": {"pattern": "m gm m gm", "width": 128, "blocks": {"m": MAMBA2, "g": SHARED}},
    "transformer_tiny": {"pattern": "4*(a d)", "width": 128, "blocks": {"a": {"heads": 4}, "d": {"width": 341}}},
    "mamba2_tiny": {"pattern": "7*m", "width": 128, "blocks": {"m": MAMBA2}},
}
TINY_PARAMETERS = {"zamba2_tiny": 1_306_976, "transformer_tiny": 1_311_360, "mamba2_tiny": 1_291_112}

# Every kind of layer at once, small: two shared copies, adapters everywhere, grouped heads, parallel branches.
MIXED: dict[str, Any] = {
    "pattern": "m gm a d (a|m) 2*gm g(m|a)",
    "width": 16,
    "tie_embeddings": False,
    "blocks": {
        "a": {"heads": 4, "kv_heads": 2, "qk_norm": True, "bias": True},
        "d": {"width": 20, "bias": True},
        "m": {"state_size": 4, "head_dim": 8, "groups": 2, "chunk": 8},
        "g": {
            "copies": 2,
            "heads": 2,
            "mlp_width": 12,
            "lora_rank": {"mlp": 2, "attention": 3},
            "rope_theta": 10000.0,
        },
    },
}


@st.composite
def architectures(draw: st.DrawFn) -> dict[str, Any]:
    """Legal architectures of at most eight layers and width 8 to 24."""
    width = draw(st.sampled_from([8, 16, 24]))
    layers = draw(st.lists(st.sampled_from(["a", "d", "m", "gm", "ga", "(a|m)", "g(a|m)"]), min_size=1, max_size=8))
    letters = {char for layer in layers for char in layer if char.isalpha()}
    calls = sum("g" in layer for layer in layers)
    tables = {
        "a": st.fixed_dictionaries(
            {"heads": st.sampled_from([2, 4]), "kv_heads": st.sampled_from([None, 1, 2])},
            optional={
                "head_dim": st.sampled_from([2, 6]),
                "qk_norm": st.booleans(),
                "bias": st.booleans(),
                "rope_theta": st.sampled_from([10_000.0, None]),
            },
        ),
        "d": st.fixed_dictionaries(
            {"width": st.integers(1, 40), "activation": st.sampled_from(["swiglu", "geglu_erf", "relu2", "gelu_tanh"])},
            optional={"bias": st.booleans()},
        ),
        "m": st.fixed_dictionaries(
            {"head_dim": st.sampled_from([2, 4]), "groups": st.sampled_from([1, 2])},
            optional={
                "expand": st.integers(1, 3),
                "state_size": st.integers(1, 9),
                "conv_width": st.integers(1, 5),
                "chunk": st.sampled_from([1, 4, 16, 32]),
            },
        ),
        "g": st.fixed_dictionaries(
            {
                "heads": st.sampled_from([1, 2]),
                "mlp_width": st.integers(1, 20),
                "copies": st.integers(1, max(1, calls)),
            },
            optional={
                "activation": st.sampled_from(["gelu_erf", "silu", "relu2"]),
                "concat_embeddings": st.booleans(),
                "call_linear": st.booleans(),
                "lora_rank": st.fixed_dictionaries({"mlp": st.integers(0, 3), "attention": st.integers(0, 3)}),
                "rope_theta": st.sampled_from([10_000.0, None]),
            },
        ),
    }
    blocks = {letter: draw(tables[letter]) for letter in sorted(letters)}
    tie = draw(st.booleans())
    return {"pattern": " ".join(layers), "width": width, "tie_embeddings": tie, "blocks": blocks}
