"""a: causal multi-head attention with grouped keys and values."""
