from typing import Any

LAYERS = ["gm", "m", "gm"]
WITH: dict[str, dict[str, Any]] = {"m": {"state_size": 4, "head_dim": 8, "chunk": 8}}
TABLES: dict[str, dict[str, Any]] = {
    "zamba": {"heads": 2, "mlp_width": 12, "lora_rank": {"mlp": 0, "attention": 0}},
    "zamba2": {"copies": 2, "heads": 2, "mlp_width": 12, "lora_rank": {"mlp": 2, "attention": 3}, "rope_theta": 10000.0},
    "bare": {"heads": 4, "mlp_width": 12, "concat_embeddings": False, "call_linear": False, "activation": "silu"},
}
