from typing import Any

TABLES: dict[str, dict[str, Any]] = {
    "short": {"heads": 4, "window": 5},
    "one": {"heads": 4, "window": 1, "rope_theta": None},
    "wide": {"heads": 4, "kv_heads": 2, "window": 18, "qk_norm": True},
    "whole": {"heads": 2, "window": 100, "output_gate": True},
}
