"""Which states of a trajectory stay on disk.

A rolling state (published with rolling=True) is there to resume from. The newest two stay, and those that
somebody named or pinned since; every other state was asked for when it was made and is never touched here.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection

from zexp.store import files
from zexp.store.attempt import Attempt
from zexp.store.folder import StageFolder


def superfluous(rolling: Collection[int], named: Collection[int], *, newest: int = 2) -> list[int]:
    """Of the rolling states' token counts those that nobody needs, ascending.

    The newest ones stay even where they are named as well, so naming never costs a fallback.
    """
    if newest < 0:
        raise ValueError(f"newest = {newest}: cannot keep fewer than 0 states.")
    ordered = sorted(set(rolling))
    return [tokens for tokens in ordered[: max(0, len(ordered) - newest)] if tokens not in set(named)]


def rolling_states(folder: StageFolder) -> list[int]:
    """The token counts of the states that were published with rolling=True, ascending."""
    found = []
    for tokens in folder.states():
        path = folder.state(tokens)
        if path is not None and files.read_json(path / files.MANIFEST).get("rolling") is True:
            found.append(tokens)
    return found


def prune(attempt: Attempt, keep: Collection[int], *, newest: int = 2) -> list[int]:
    """Delete the superfluous rolling states of the attempt's trajectory. Returns their token counts.

    keep: token counts that this request names; the folder's pins are added. Raises LeaseLost.
    """
    folder = attempt.folder
    gone = superfluous(rolling_states(folder), {*keep, *folder.pins()}, newest=newest)
    trash = folder.path / "trash"
    for tokens in gone:
        attempt.check(fresh=True)
        trash.mkdir(exist_ok=True)
        # Renamed first: killed at any instant, a state is whole in its place or not there.
        os.rename(folder.path / "states" / str(tokens), trash / f"{tokens}-{secrets.token_hex(4)}")
    if gone:
        files.sync_folder(folder.path / "states")
    shutil.rmtree(trash, ignore_errors=True)  # also what a killed one left; what stays, the next call deletes
    return gone
