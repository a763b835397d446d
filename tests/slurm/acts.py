"""Handlers that do what the stage's label says; made results, no training."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

from zexp.store.attempt import Attempt
from zexp.store.folder import StageFolder, Store


def run(store: Store, folder: StageFolder, request: dict[str, Any], attempt: Attempt) -> str:
    label = request["logger"]["name"]
    print("said by", label)
    if "fails" in label or ("shy" in label and attempt.n == 1):
        raise RuntimeError(f"{label} cannot go on")
    if "preempted" in label:  # told to stop before it has a state, each time
        os.kill(os.getppid(), signal.SIGUSR2)
        time.sleep(60)
    time.sleep(float(os.environ["SLOW_STEP_SECONDS"]))
    scratch = attempt.scratch("state")
    (scratch / "optimizer").mkdir()
    (scratch / "optimizer" / "made").write_text(label)
    facts = {"tokens": request["to"], "step": 1, "fingerprints": [], "fingerprint_details": {}}
    (scratch / "state.json").write_text(json.dumps(facts))
    attempt.publish(scratch, f"states/{request['to']}")
    return "done"
