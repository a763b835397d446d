"""Sizes of the scan that formulas know too. No torch."""

CHUNK = 16  # positions between two kept states: more keep less, and leave the cache
