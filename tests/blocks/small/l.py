from typing import Any

TABLES: dict[str, dict[str, Any]] = {
    "olmo": {"key_heads": 2, "negative_eigenvalues": True, "chunk": 8},
    "qwen": {"key_heads": 2, "value_heads": 4, "key_head_dim": 5, "value_head_dim": 6, "chunk": 32, "conv_width": 2},
    "no gate": {"key_heads": 1, "value_heads": 3, "key_head_dim": 4, "output_gate": False, "chunk": 64},
    "one chunk position": {"key_heads": 3, "chunk": 1, "conv_width": 1, "value_head_dim": 2},
}
