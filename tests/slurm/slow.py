"""A real training that takes its time: a sleep in front of each optimizer step, so that faults find it at work.

A stage whose label says `raises` fails while the file `raise` is in the store.
"""

from __future__ import annotations

import os
import time
from typing import Any

from zexp.store.attempt import Attempt
from zexp.store.folder import StageFolder, Store


def run(store: Store, folder: StageFolder, request: dict[str, Any], attempt: Attempt) -> str:
    from zexp.train import loop

    if "raises" in request["logger"]["name"] and (store.root / "raise").exists():
        raise RuntimeError("this arm raises")
    seconds = float(os.environ["SLOW_STEP_SECONDS"])
    step = loop._Loop._step

    def slow_step(self: Any, *arguments: Any) -> Any:
        time.sleep(seconds)
        return step(self, *arguments)

    loop._Loop._step = slow_step  # type: ignore[method-assign]  # this process runs one stage
    return loop.run(store, folder, request, attempt)
