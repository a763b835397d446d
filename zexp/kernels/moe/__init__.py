"""Experts: MLPs of which each token is computed with a few."""
