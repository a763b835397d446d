"""The numerics fingerprints that a chain of segments was trained under, from state.json of its states.

state.json has the intervals {from, to, fingerprint: name} and, by name, the details.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from zexp.report.model import Stage
from zexp.report.status import folder_of
from zexp.store.files import read_json
from zexp.store.folder import Store

# Which of their operations two models share decides what can differ: a key only one of them has is no difference.
BY_OPERATION = ("backends", "packages")


@dataclass
class Fingerprints:
    """Every fingerprint seen, by name."""

    details: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def of_chain(self, store: Store, chain: Iterable[Stage]) -> set[str]:
        """The names of all fingerprints up to the chain's last state that is there."""
        found: set[str] = set()
        for stage in chain:
            folder = folder_of(store, stage)
            states = [path for tokens, path in folder.reported().items() if stage.to is None or tokens <= stage.to]
            if not states:
                continue
            facts = read_json(states[-1] / "state.json")
            self.details.update(facts["fingerprint_details"])
            found |= {interval["fingerprint"] for interval in facts["fingerprints"]}
        return found

    def difference(self, names: Iterable[str]) -> str:
        """What differs between any two of them, as `threads: 1 or 2`; empty if nothing does."""
        differing: dict[str, set[str]] = {}
        for one, other in combinations([self.details[name] for name in sorted(set(names))], 2):
            for key in sorted({*one, *other}):
                ours, theirs = one.get(key), other.get(key)
                if key in BY_OPERATION and isinstance(ours, Mapping) and isinstance(theirs, Mapping):
                    for operation in sorted(ours.keys() & theirs.keys()):
                        if ours[operation] != theirs[operation]:
                            differing.setdefault(f"{key}.{operation}", set()).update(
                                {_say(ours[operation]), _say(theirs[operation])}
                            )
                elif ours != theirs:
                    differing.setdefault(key, set()).update({_say(ours), _say(theirs)})
        return "; ".join(f"{key}: {' or '.join(sorted(found))}" for key, found in differing.items())


def _say(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
