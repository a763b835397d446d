from typing import Any

TABLES: dict[str, dict[str, Any]] = {
    "mixtral": {"width": 12, "experts": 4, "z_loss": 0.001, "routing_group": "document"},
    "jamba": {"width": 12, "experts": 5, "top_k": 3, "normalise": False, "aux_loss": 0.0, "activation": "gelu_tanh"},
    "blackmamba": {
        "width": 12, "experts": 4, "top_k": 1, "router": "sigmoid", "router_bias": True, "activation": "geglu_erf",
        "aux_loss": 0.0, "sinkhorn_iterations": 4, "routing_group": "document",
    },
    "deepseek": {
        "width": 8, "experts": 6, "top_k": 2, "router": "sigmoid", "routed_scale": 2.5, "bias_rate": 0.001,
        "aux_loss": 0.0001, "shared_width": 8,
    },
    "qwen": {"width": 6, "experts": 3, "top_k": 3, "shared_width": 10, "shared_gate": True, "activation": "relu2"},
}  # fmt: skip
