"""Handlers that act as the request says, and leave a line in the store's record for each start and end."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from zexp.store.attempt import Attempt
from zexp.store.folder import StageFolder, Store
from zexp.train.signals import StopFlag


def run(store: Store, folder: StageFolder, request: dict[str, Any], attempt: Attempt) -> str:
    _record(store, request, "start", torch="torch" in sys.modules, n=attempt.n)
    print("said by", request["stage"])
    act = request.get("act", "work")
    if act == "raise" or (act == "raise once" and attempt.n == 1):
        raise RuntimeError(f"{request['stage']} cannot go on")
    if act == "raise while another trains":
        while not any(line["what"] == "training" and line["stage"] == request["other"] for line in read(store.root)):
            time.sleep(0.01)
        raise RuntimeError(f"{request['stage']} cannot go on")
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "kill server":
        os.kill(os.getppid(), signal.SIGKILL)
    if act == "multiply":
        import torch

        torch.set_num_threads(2)
        size = torch.randn(600, 600)
        print("multiplied", (size @ size).shape[0], flush=True)
    if act == "lie":
        return "done"
    if act == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _record(store, request, "deaf")
    if act == "diverge":
        attempt.diverge(100, "loss is nan")
        return "diverged"
    end = time.monotonic() + request.get("seconds", 0.0)
    if act == "train":
        with StopFlag() as stop:
            _record(store, request, "training")
            while time.monotonic() < end:
                attempt.progress(1, 10, "tokens", loss=3.0)
                if stop.requested:
                    _record(store, request, "checkpoint")
                    return "interrupted"
                time.sleep(0.01)
    while time.monotonic() < end:
        time.sleep(0.01)
    scratch = attempt.scratch("result")
    (scratch / "said").write_text(request["stage"])
    _record(store, request, "end")
    attempt.publish(scratch, f"states/{request['to']}" if request["kind"] == "segment" else "result")
    return "done"


def _record(store: Store, request: dict[str, Any], what: str, **facts: Any) -> None:
    line = {"stage": request["stage"], "what": what, "time": time.time(), "pid": os.getpid(), "server": os.getppid()}
    environment = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    with open(store.root / "record.jsonl", "ab", buffering=0) as record:
        record.write(json.dumps({**line, **facts, **environment}).encode() + b"\n")


def read(root: Path) -> list[dict[str, Any]]:
    """The lines of the record so far."""
    path = root / "record.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
