from typing import Any

TABLES: dict[str, dict[str, Any]] = {
    "plain": {"state_size": 4, "head_dim": 8, "chunk": 8},
    "groups": {"state_size": 4, "head_dim": 8, "groups": 2, "chunk": 32, "conv_width": 2},
    "limits": {"state_size": 3, "head_dim": 4, "dt_min": 0.01, "dt_max": 0.05, "norm_before_gate": True, "chunk": 4},
    "one chunk position": {"state_size": 4, "head_dim": 16, "expand": 1, "chunk": 1, "conv_width": 1},
}
