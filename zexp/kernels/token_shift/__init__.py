"""RWKV's token shift: each position mixed with the one before it."""
