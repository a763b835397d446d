"""Seconds to find the k-th window of a source, and how they grow with the source: the order is O(1), so not at all.

    python benchmarks/order_lookup.py
"""

import time

from zexp.data.order import bin_of

LOOKUPS = 5000


def seconds(bins: int) -> float:
    """Of one lookup, the best of five rounds."""
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        for i in range(LOOKUPS):
            bin_of(1, "packing", 0, i, bins)
        best = min(best, (time.perf_counter() - begin) / LOOKUPS)
    return best


if __name__ == "__main__":
    small, large = seconds(31_000), seconds(31_000_000)
    print(f"31 K windows: {small * 1e6:.1f} µs a lookup; 31 M windows: {large * 1e6:.1f} µs, {large / small:.2f} times that")
