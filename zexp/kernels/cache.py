"""Where a user's compiled kernels and passed self-checks are kept. No torch."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """$XDG_CACHE_HOME/zexp/kernels, or below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zexp" / "kernels"
