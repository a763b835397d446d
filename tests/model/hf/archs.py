"""A small architecture of ours for every family, and a small config of theirs."""

from __future__ import annotations

from typing import Any

VOCAB, WIDTH = 97, 32

_M = {"state_size": 8, "head_dim": 8, "groups": 2, "chunk": 16}
_A = {"heads": 4, "kv_heads": 2}
_D = {"width": 44}
_R = {"state_size": 5}
_UNTIED = {"tie_embeddings": False}
_LAYER_NORM = {"norm": {"kind": "layernorm"}}

# name: (the class that holds it, the architecture)
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"pattern": "2*(a d)", "norm": {"eps": 1e-6}, "blocks": {"a": _A | {"head_dim": 12}, "d": _D}}),
    "llama with biases and other positions": (
        "Llama",
        {
            "pattern": "2*(a d)",
            **_UNTIED,
            "blocks": {
                "a": _A | {"bias": True, "rope_theta": 500.0, "rope_scaling": {"factor": 4.0, "original_positions": 16}},
                "d": _D | {"bias": True, "activation": "geglu_tanh"},
            },
        },
    ),
    "mistral": ("Mistral", {"pattern": "2*(w d)", **_UNTIED, "blocks": {"w": _A | {"window": 5}, "d": _D}}),
    "gpt_neox": (
        "GPTNeoX",
        {
            "pattern": "2*(a|d)",
            **_UNTIED,
            **_LAYER_NORM,
            "parallel": {"norms": "separate"},
            "blocks": {
                "a": {"heads": 4, "bias": True, "rope_fraction": 0.5},
                "d": {"width": 64, "activation": "gelu_erf", "bias": True},
            },
        },
    ),
    "gpt_neox one after the other": (
        "GPTNeoX",
        {
            "pattern": "2*(a d)",
            **_LAYER_NORM,
            "blocks": {"a": {"heads": 4}, "d": {"width": 64, "activation": "gelu_tanh", "bias": True}},
        },
    ),
    "mixtral": ("Mixtral", {"pattern": "2*(a e)", **_UNTIED, "blocks": {"a": _A, "e": _D | {"experts": 3}}}),
    "mixtral with a window": (
        "Mixtral",
        {"pattern": "2*(w e)", **_UNTIED, "blocks": {"w": _A | {"window": 7}, "e": _D | {"experts": 4, "top_k": 3}}},
    ),
    "mamba": ("Mamba", {"pattern": "3*r", "blocks": {"r": _R}}),
    "mamba with other biases": ("Mamba", {"pattern": "2*r", "blocks": {"r": _R | {"dt_rank": 3, "bias": True, "conv_bias": False}}}),
    "mamba2": ("Mamba2", {"pattern": "2*m", "blocks": {"m": _M}}),
    "mamba2 with bounds of dt": ("Mamba2", {"pattern": "2*m", **_UNTIED, "blocks": {"m": _M | {"dt_min": 0.1, "dt_max": 0.8}}}),
    "zamba": ("Zamba", {"pattern": "r gr r r gr", "blocks": {"r": _R | {"heads": 4}, "g": {"heads": 4, "mlp_width": 48}}}),
    "zamba2": (
        "Zamba2",
        {
            "pattern": "m gm m 2*gm",
            "blocks": {
                "m": _M,
                "g": {"copies": 2, "heads": 4, "mlp_width": 48, "lora_rank": {"mlp": 4, "attention": 4}, "rope_theta": 1e4},
            },
        },
    ),
    "zamba2 with a lower bound of dt": (
        "Zamba2",
        {"pattern": "m gm m", "blocks": {"m": _M | {"dt_min": 0.1}, "g": {"heads": 4, "mlp_width": 48, "lora_rank": {"mlp": 4}}}},
    ),
    "jamba": (
        "Jamba",
        {
            "pattern": "r d r e a d r e",
            **_UNTIED,
            "blocks": {
                "r": _R | {"inner_norms": True},
                "a": _A | {"rope_theta": None},
                "d": _D,
                "e": _D | {"experts": 4, "normalise": False},
            },
        },
    ),
    "jamba without experts": (
        "Jamba",
        {"pattern": "2*(r d a d)", **_UNTIED, "blocks": {"r": _R | {"inner_norms": True}, "a": _A | {"rope_theta": None}, "d": _D}},
    ),
    "bamba": ("Bamba", {"pattern": "m d a d m d", **_UNTIED, "blocks": {"m": _M, "a": _A | {"rope_fraction": 0.5}, "d": _D}}),
    "lfm2": ("Lfm2", {"pattern": "c d a d c d", "blocks": {"c": {"bias": True}, "a": _A | {"qk_norm": True}, "d": _D}}),
    "nemotron_h": (
        "NemotronH",
        {"pattern": "M-M*-", **_UNTIED, "blocks": {"m": _M, "a": _A | {"rope_theta": None}, "d": _D | {"activation": "relu2"}}},
    ),
    "nemotron_h with experts": (
        "NemotronH",
        {
            "pattern": "MEM*E",
            **_UNTIED,
            "blocks": {
                "m": _M,
                "a": _A | {"rope_theta": None},
                "e": {
                    "width": 20, "experts": 4, "activation": "relu2", "router": "sigmoid", "bias_rate": 0.01, "shared_width": 24,
                    "routed_scale": 2.5,
                },
            },
        },
    ),
}  # fmt: skip

_SMALL = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_attention_heads": 4}
_GQA = _SMALL | {"num_key_value_heads": 2, "intermediate_size": 44}
# name: (model_type, the keys of its config)
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GQA | {"num_hidden_layers": 2}),
    "llama 3": (
        "llama",
        _GQA
        | {
            "num_hidden_layers": 2,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": ("mistral", _GQA | {"num_hidden_layers": 2, "sliding_window": 6}),
    "mistral without a window": ("mistral", _GQA | {"num_hidden_layers": 2, "sliding_window": None}),
    "gpt_neox": ("gpt_neox", _SMALL | {"num_hidden_layers": 2, "intermediate_size": 64}),
    "gpt_neox one after the other": (
        "gpt_neox", _SMALL | {"num_hidden_layers": 2, "intermediate_size": 64, "use_parallel_residual": False},
    ),
    "mixtral": ("mixtral", _GQA | {"num_hidden_layers": 2, "num_local_experts": 3}),
    "mamba": ("mamba", {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 8}),
    "mamba2": (
        "mamba2",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 8, "head_dim": 8, "num_heads": 8, "n_groups": 2},
    ),
    "zamba": (
        "zamba",
        _SMALL | {"num_hidden_layers": 9, "num_key_value_heads": 4, "intermediate_size": 48, "n_mamba_heads": 2, "mamba_d_state": 8},
    ),
    "zamba2": (
        "zamba2",
        _SMALL
        | {
            "num_hidden_layers": 5, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid"], "mamba_d_state": 8,
            "n_mamba_heads": 8, "mamba_ngroups": 2, "num_mem_blocks": 2, "adapter_rank": 4, "use_mem_rope": True,
            "use_shared_attention_adapter": True, "intermediate_size": 48, "chunk_size": 8,
        },
    ),
    "jamba": (
        "jamba",
        _GQA | {"num_hidden_layers": 4, "num_experts": 3, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    ),
    "bamba": (
        "bamba",
        _GQA
        | {
            "num_hidden_layers": 3, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_state": 8, "mamba_n_groups": 2,
            "mamba_chunk_size": 8,
        },
    ),
    "lfm2": ("lfm2", _GQA | {"num_hidden_layers": 3, "full_attn_idxs": [1], "block_multiple_of": 4}),
    "nemotron_h": (
        "nemotron_h",
        _GQA
        | {
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"], "head_dim": 8, "ssm_state_size": 8,
            "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "n_routed_experts": 3, "moe_intermediate_size": 20,
            "moe_shared_expert_intermediate_size": 24,
        },
    ),
}  # fmt: skip
