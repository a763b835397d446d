from typing import Any

TABLES: dict[str, dict[str, Any]] = {
    "plain": {"heads": 4},
    "grouped": {"heads": 4, "kv_heads": 2, "head_dim": 6, "qk_norm": True, "bias": True},
    "no positions": {"heads": 2, "kv_heads": 1, "rope_theta": None, "logit_scale": 0.2, "qkv_bias": True},
    "partial": {"heads": 2, "rope_fraction": 0.25, "output_gate": True},
    "scaled": {"heads": 2, "rope_scaling": {"factor": 4.0, "low_turns": 1.0, "high_turns": 4.0, "original_positions": 8}},
}
