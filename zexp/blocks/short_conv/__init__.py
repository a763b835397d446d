"""c: gated short convolution, the mixer of LFM2."""
