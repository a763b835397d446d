from typing import Any

TABLES: dict[str, dict[str, Any]] = {
    "lfm2": {},
    "bias": {"conv_width": 5, "bias": True},
    "gates alone": {"conv_width": 1},
}
