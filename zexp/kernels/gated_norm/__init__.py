"""RMSNorm of a gated value, as in Mamba2."""
