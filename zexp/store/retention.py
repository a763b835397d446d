"""Which states of a trajectory stay on disk.

A rolling state (published with rolling=True) is there to resume from. The newest two stay, and those that
somebody named or pinned since; every other state was asked for when it was made and stays. Of a state that is only
scored the optimizer part, two thirds of its bytes, may be dropped; a fork of it replays from an earlier state.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path

from zexp.store import files
from zexp.store.attempt import Attempt
from zexp.store.folder import OPTIMIZER, StageFolder

NEWEST = 2  # rolling states that stay unless a request says another number
_TRASH = "trash-"


def superfluous(rolling: Collection[int], named: Collection[int], *, newest: int = NEWEST) -> list[int]:
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


def prune(attempt: Attempt, keep: Collection[int], *, newest: int = NEWEST) -> list[int]:
    """Delete the superfluous rolling states of the attempt's trajectory. Returns their token counts.

    keep: token counts that this request names; the folder's pins are added. Raises LeaseLost.
    """
    folder = attempt.folder
    gone = superfluous(rolling_states(folder), {*keep, *folder.pins()}, newest=newest)
    for tokens in gone:
        attempt.check(fresh=True)
        _to_trash(folder, folder.path / "states" / str(tokens))
    if gone:
        files.sync_folder(folder.path / "states")
    _empty_trash(folder)
    return gone


def drop_optimizer(folder: StageFolder, tokens: int) -> bool:
    """Make a state weights-only, unless some study forks it. True if that was done now.

    Needs no lease: one rename, of something that nobody reads, since who trains from it has said so by a pin.
    """
    state = folder.trainable(tokens)
    if state is None or folder.keeps_optimizer(tokens):
        return False
    if OPTIMIZER not in files.read_json(state / files.MANIFEST).get("droppable", []):
        return False  # its manifest would call it damaged
    try:
        _to_trash(folder, state / OPTIMIZER)
    except FileNotFoundError:  # another process did the same
        return False
    files.sync_folder(state)
    _empty_trash(folder)
    return True


def _to_trash(folder: StageFolder, path: Path) -> None:
    # Renamed first: killed at any instant, it is whole in its place or not there.
    os.rename(path, folder.path / f"{_TRASH}{path.name}-{secrets.token_hex(4)}")


def _empty_trash(folder: StageFolder) -> None:
    for gone in folder.path.glob(f"{_TRASH}*"):  # also what a killed one left; what stays, the next deletes
        shutil.rmtree(gone, ignore_errors=True)
