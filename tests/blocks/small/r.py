from typing import Any

TABLES: dict[str, dict[str, Any]] = {
    "plain": {"state_size": 4},
    "heads": {"state_size": 3, "heads": 2, "dt_rank": 5, "conv_width": 2, "expand": 1},
    "inner norms": {"state_size": 5, "inner_norms": True, "dt_rank": 3, "expand": 3},
    "biases": {"state_size": 16, "heads": 4, "inner_norms": True, "conv_bias": False, "bias": True, "conv_width": 1},
}
