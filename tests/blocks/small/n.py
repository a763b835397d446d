from typing import Any

TABLES: dict[str, dict[str, Any]] = {
    "cubic": {"width": 12},
    "linear": {"width": 5, "grid": 3, "order": 1, "range": 2.0, "base": "gelu_erf"},
    "quartic": {"width": 20, "grid": 2, "order": 4, "range": 0.5, "base": "relu2"},
}
