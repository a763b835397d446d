"""In which order a packing's bins are read: a keyed permutation per epoch, O(1) at any index, nothing stored."""

from __future__ import annotations

import hashlib
from functools import lru_cache

NUMERICS = {"data.order": 1}
ROUNDS = 8  # alternating half-rounds: 4 full Feistel rounds, past which a PRF-based one is a PRP (Luby, Rackoff 1988)
_MASK = (1 << 64) - 1


def bin_of(seed: int, packing: str, epoch: int, index: int, bins: int) -> int:
    """The bin read as the index-th of an epoch, 0 <= index < bins; a bijection on [0, bins).

    Depends on its arguments alone.  Feistel network over the smallest power of two that holds `bins`, walked along its
    cycle until it lands inside: fewer than two steps on average.
    """
    if not 0 <= index < bins:
        raise ValueError(f"index {index} is not in an epoch of {bins} bins")
    if bins == 1:
        return 0
    bits = max(2, (bins - 1).bit_length())
    low_bits = bits // 2
    low_mask = (1 << low_bits) - 1
    high_mask = (1 << (bits - low_bits)) - 1
    keys = _keys(seed, packing, epoch)
    value = index
    while True:
        high, low = value >> low_bits, value & low_mask
        for turn in range(0, ROUNDS, 2):
            high ^= _mixed(low ^ keys[turn]) & high_mask
            low ^= _mixed(high ^ keys[turn + 1]) & low_mask
        value = high << low_bits | low
        if value < bins:
            return value


def locate(seed: int, packing: str, window: int, bins: int) -> tuple[int, int]:
    """(epoch, bin) of a packing's window-th window; every epoch reads every bin once, in an order of its own."""
    epoch, index = divmod(window, bins)
    return epoch, bin_of(seed, packing, epoch, index, bins)


def _mixed(value: int) -> int:
    """64 well-mixed bits of a 64-bit value: the finaliser of splitmix64 (Steele et al. 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


@lru_cache(maxsize=1024)
def _keys(seed: int, packing: str, epoch: int) -> tuple[int, ...]:
    digest = hashlib.sha512(f"{seed}:{packing}:{epoch}".encode()).digest()
    return tuple(int.from_bytes(digest[8 * turn : 8 * turn + 8], "little") for turn in range(ROUNDS))
