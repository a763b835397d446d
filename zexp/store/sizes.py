"""How much room files take: as long as they are, and as the disk counts them (blocks, sparse parts left out)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK = 512  # st_blocks counts in this unit, whatever the file system's own blocks are


@dataclass(frozen=True)
class Size:
    """apparent: bytes that a reader sees; disk: bytes that deleting gives back."""

    apparent: int = 0
    disk: int = 0
    files: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.apparent + other.apparent, self.disk + other.disk, self.files + other.files)

    def to_json(self) -> dict[str, int]:
        return {"apparent": self.apparent, "disk": self.disk, "files": self.files}


def total(sizes: Iterator[Size] | list[Size]) -> Size:
    """Their sum."""
    whole = Size()
    for size in sizes:
        whole += size
    return whole


def measure(path: Path) -> Size:
    """The size of a file, or of all below a folder; nothing if it is not there."""
    return total(list(parts(path, lambda names: "").values()))


def parts(root: Path, part: Callable[[tuple[str, ...]], str]) -> dict[str, Size]:
    """Sizes of what is below root, added up by what part() says of each file's names below it.

    Another process may delete while this walks: what is gone takes no room. A file with several names counts once.
    Folders themselves count by their blocks, under the part of what they would hold.
    """
    found: dict[str, Size] = {}
    seen: set[tuple[int, int]] = set()
    for names, facts, is_folder in _walk(root):
        if not is_folder and facts.st_nlink > 1:
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
        key = part(names)
        own = Size(0 if is_folder else facts.st_size, facts.st_blocks * BLOCK, 0 if is_folder else 1)
        found[key] = found.get(key, Size()) + own
    return found


def _walk(root: Path) -> Iterator[tuple[tuple[str, ...], Any, bool]]:
    """(names below root, lstat, whether it is a folder) of root and all below it."""
    try:
        facts = os.lstat(root)
    except FileNotFoundError:
        return
    waiting: list[tuple[str, tuple[str, ...]]] = []
    is_folder = os.path.isdir(root) and not os.path.islink(root)
    yield (), facts, is_folder
    if is_folder:
        waiting.append((str(root), ()))
    while waiting:
        folder, names = waiting.pop()
        try:
            entries = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            continue
        for entry in entries:
            try:
                facts = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            below = (*names, entry.name)
            is_folder = entry.is_dir(follow_symlinks=False)
            yield below, facts, is_folder
            if is_folder:
                waiting.append((entry.path, below))
