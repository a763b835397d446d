"""Structured state-space duality, the sequence mixing of Mamba2."""
