from typing import Any

TABLES: dict[str, dict[str, Any]] = {
    "swiglu": {"width": 20},
    "geglu": {"width": 12, "activation": "geglu_erf", "bias": True},
    "geglu tanh": {"width": 12, "activation": "geglu_tanh"},
    "gelu": {"width": 12, "activation": "gelu_erf"},
    "relu2": {"width": 12, "activation": "relu2", "bias": True},
    "relu": {"width": 12, "activation": "relu"},
    "channel mix": {"width": 24, "activation": "relu2", "token_shift": True},
    "gated shift": {"width": 12, "activation": "swiglu", "bias": True, "token_shift": True},
}
