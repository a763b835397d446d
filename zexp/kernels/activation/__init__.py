"""Activations of MLPs, gated or not."""
