"""r: Mamba-1 (selective state space)."""
