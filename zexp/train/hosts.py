"""Names of a SLURM node list: `n[1-3,07],login` is n1, n2, n3, n07, login."""

from __future__ import annotations

import re
from itertools import product

_PART = re.compile(r"\[([^][]*)\]|([^][]+)")


def hostnames(nodelist: str) -> list[str]:
    """All of them, in order. Raises ValueError for a text that is no list of nodes."""
    names: list[str] = []
    for entry in re.split(r",(?![^[]*\])", nodelist.strip()):
        parts = list(_PART.finditer(entry))
        if not entry or "".join(part[0] for part in parts) != entry:
            raise ValueError(f"{nodelist!r} is no list of nodes: it looks like node1,node[2-4,07].")
        choices = [[part[2]] if part[1] is None else _numbers(part[1], nodelist) for part in parts]
        names += ["".join(chosen) for chosen in product(*choices)]
    return names


def _numbers(ranges: str, nodelist: str) -> list[str]:
    """The numbers of 2-4,07, with the zeros that they are written with."""
    found: list[str] = []
    for one in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", one)
        if match is None:
            raise ValueError(f"{nodelist!r} is no list of nodes: [{ranges}] is no list of numbers.")
        first, last = match[1], match[2] or match[1]
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found
