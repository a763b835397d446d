from typing import Any

TABLES: dict[str, dict[str, Any]] = {
    "plain": {"heads": 4},
    "no convolution": {"heads": 2, "conv_width": None},
    "one head": {"heads": 1, "conv_width": 2},
    "narrow heads": {"heads": 8, "conv_width": 1},
}
