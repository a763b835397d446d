"""What RWKV-7 does to a head's output: norm, the bonus of the position itself, gate."""
