from typing import Any

TABLES: dict[str, dict[str, Any]] = {
    "heads": {"head_dim": 4, "lora_rank": {"decay": 3, "rate": 2, "value": 1, "gate": 5}},
    "one head": {"head_dim": 16, "lora_rank": {"decay": 1, "rate": 4, "value": 3, "gate": 2}},
}
