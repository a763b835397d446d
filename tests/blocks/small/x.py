from typing import Any

TABLES: dict[str, dict[str, Any]] = {
    "plain": {"heads": 2, "chunk": 8},
    "uncapped": {
        "heads": 4,
        "qk_factor": 1.0,
        "value_factor": 2.0,
        "gate_softcap": None,
        "input_bias": 0.0,
        "chunk": 16,
    },
    "one head": {"heads": 1, "qk_factor": 0.25, "value_factor": 1.5, "gate_softcap": 5.0, "chunk": 1},
    "one chunk": {"heads": 8, "input_bias": 1.0, "chunk": 64},
}
