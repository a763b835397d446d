"""Stages whose outcome depends on the peak learning rate alone, and a callback that writes down what Hydra tells it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback

from zexp.store.attempt import Attempt
from zexp.store.folder import StageFolder, Store

KINDS = ("tokenizer", "corpus", "packing", "tasks", "segment", "eval")
HANDLERS = "{" + ",".join(f"{kind}:'tests.study.fakes:run'" for kind in KINDS) + "}"
FAILS, DIVERGES = 0.01, 0.02  # peak LRs from which a segment fails, or diverges
METRIC = "bpb_base/bits_per_byte"


def run(store: Store, folder: StageFolder, request: dict[str, Any], attempt: Attempt) -> str:
    scratch = attempt.scratch("result")
    kind = request["kind"]
    with open(store.root / "started", "a") as file:
        file.write(f"{kind}\n")
    if kind == "segment":
        peak = max(piece["start"] for piece in folder.semantic()["lr"])
        if peak >= DIVERGES:
            attempt.diverge(request["to"], "loss is nan")
            return "diverged"
        if peak >= FAILS:
            raise RuntimeError("no more memory")
        for part in ("weights", "optimizer"):
            (scratch / part).mkdir()
        details = {"cpu": {"device": "none"}}
        facts = {"fingerprints": [{"from": 0, "to": request["to"], "fingerprint": "cpu"}], "fingerprint_details": details}
        (scratch / "state.json").write_text(json.dumps(facts))
        attempt.publish(scratch, f"states/{request['to']}")
        return "done"
    if kind == "eval":
        state = folder.semantic()["state"]
        peak = max(piece["end"] for piece in store.folder("trajectory", state["id"]).semantic()["lr"])
        metrics = {"bits_per_byte": {"value": score(peak), "stderr": 0.01, "n": 10, "higher_is_better": False}}
        (scratch / "results.json").write_text(json.dumps({"metrics": metrics}))
    (scratch / "manifest.json").write_text('{"bins": 100000000}')
    attempt.publish(scratch, "result")
    return "done"


def score(peak: float) -> float:
    """Best at 1e-3."""
    return 2.0 + abs(math.log10(peak) + 3)


class Recorder(Callback):
    """One line a call, in the file that the environment names."""

    def _write(self, what: str, config: Any, **facts: Any) -> None:
        root = Path(config.store)
        facts |= {"num": config.hydra.job.get("num"), "started": (root / "started").exists()}
        with open(os.environ["RECORD"], "a") as file:
            file.write(json.dumps({"what": what, **facts}) + "\n")

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        self._write("multirun start", config, num=None)

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        self._write("multirun end", config)

    def on_run_start(self, config: Any, **kwargs: Any) -> None:
        self._write("run start", config)

    def on_run_end(self, config: Any, **kwargs: Any) -> None:
        self._write("run end", config)

    def on_job_start(self, config: Any, *, task_function: Any, **kwargs: Any) -> None:
        node = HydraConfig.get()
        assert Path(node.runtime.output_dir).is_dir()
        self._write("job start", config, overrides=list(node.overrides.task), dirname=node.job.override_dirname)

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        self._write(
            "job end",
            config,
            overrides=list(job_return.overrides),
            status=job_return.status.name,
            value=str(job_return._return_value),
            lr=job_return.cfg.schedule.peak_lr,
            has_hydra="hydra" in job_return.cfg,
            hydra_num=job_return.hydra_cfg.hydra.job.get("num"),
            task=job_return.task_name,
            directory=job_return.working_dir,
        )
