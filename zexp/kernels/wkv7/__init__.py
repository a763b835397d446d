"""The state update of RWKV-7, and what its block computes around it for every head."""
