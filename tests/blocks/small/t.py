from typing import Any

TABLES: dict[str, dict[str, Any]] = {
    "plain": {"heads": 4, "chunk": 8},
    "no positions": {"heads": 2, "rope_theta": None, "first_decay": 1.0, "last_decay": 3.0, "chunk": 16},
    "no gate": {"heads": 1, "value_expansion": 1.5, "gate": False, "rope_theta": 100.0, "chunk": 1},
    "one chunk": {"heads": 8, "value_expansion": 1, "last_decay": 9.0, "chunk": 64},
}
