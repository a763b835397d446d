"""Sizes of the scan that formulas know too. No torch."""

CHUNK = 16  # positions between two kept states: more keep less, and leave the cache
SEGMENT = 64  # the same of the kernel in C++: a fourth of a number a channel and position for a state of 16
