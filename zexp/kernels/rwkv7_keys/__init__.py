"""The two keys of RWKV-7: what a position removes from the state, and what it writes."""
