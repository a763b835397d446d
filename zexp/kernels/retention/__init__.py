"""Retention, the sequence mixing of RetNet."""
