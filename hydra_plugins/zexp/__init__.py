"""Thin Hydra plugins: everything in them calls zexp.study."""
