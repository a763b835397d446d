"""A norm per head, with or without a gate, after a mixer."""
