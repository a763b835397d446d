"""What the store says when it must not go on."""

from __future__ import annotations


class StoreError(RuntimeError):
    """What lies in the store is not what its name, its checksums or its config say."""


class LeaseLost(StoreError):
    """Somebody else took the folder over. This attempt published nothing more and has to stop."""
