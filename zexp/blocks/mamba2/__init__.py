"""m: Mamba2 (state-space duality)."""
