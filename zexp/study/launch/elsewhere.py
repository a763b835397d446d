"""Which stages another process has in hand: a driver leaves them alone, and looks again until they are done or free."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zexp.store import lease
from zexp.store.folder import StageFolder
from zexp.store.lease import Holder, LeaseTimes


@dataclass
class Elsewhere:
    """Looks at the leases of stages. Of a holder on another machine only its heartbeat tells that it is alive."""

    times: LeaseTimes
    _seen: dict[str, tuple[Holder, float]] = field(default_factory=dict)  # by stage: its lease, since when it is the same

    def holder(self, stage_id: str, folder: StageFolder) -> dict[str, Any] | None:
        """The facts of the process that has a stage in hand; None if it is free, its holder dead or silent for too long."""
        found = lease.read(folder.path)
        if found is None or found.free:
            self._seen.pop(stage_id, None)
            return None
        now = time.monotonic()
        before, since = self._seen.get(stage_id, (found, now))
        if found != before:
            since = now
        self._seen[stage_id] = (found, since)
        return found.facts if now - since < self.times.timeout else None


def waits_for(holder: Mapping[str, Any]) -> str:
    """What a person is told of a stage that another process has in hand."""
    by = f"process {holder['pid']} on {holder['host']}" if holder.get("pid") else "another process"
    return f"waits for {by}, which has it in hand"
