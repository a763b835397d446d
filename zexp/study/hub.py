"""What a study's evaluations load from the Hugging Face hub, fetched by the machine that submits: nodes may not reach it.

    store/hub/                 HF_HOME of the jobs, unless the environment names another one
    store/hub/zexp-fetched/    a file for each task that was fetched, with what the cache had then
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from zexp.config.errors import ConfigError
from zexp.evaluate.fetch import loads
from zexp.store import files
from zexp.store.folder import Store
from zexp.store.ids import canonical_json
from zexp.study.launch import environment
from zexp.study.plan import Plan


def to_fetch(plan: Plan, store: Store) -> list[dict[str, Any]]:
    """Tasks of evaluations to do whose data is on the hub and was not fetched yet: {task, request}, each once."""
    found: dict[str, dict[str, Any]] = {}
    for stage in plan.to_do:
        if stage.kind == "eval" and loads(stage.semantic):
            task = stage.semantic["task"]
            if not _is_there(store, task):
                found.setdefault(_mark(task), {"task": task, "request": stage.request["eval"]})
    return list(found.values())


def fetch(wanted: list[dict[str, Any]], store: Store) -> None:
    """Load what the tasks need. Raises ConfigError if that does not work: nothing was submitted yet."""
    if not wanted:
        return
    names = ", ".join(one["task"]["name"] for one in wanted)
    print(f"Fetching the data of {names} to {store.hub}.", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder, "tasks.json")
        asked.write_text(json.dumps(wanted), encoding="utf-8")
        variables = {**os.environ, **environment.of_python(), "HF_HOME": str(store.hub)}
        done = subprocess.run(
            [sys.executable, "-m", "zexp.evaluate.fetch", str(asked)], env=variables, capture_output=True, text=True
        )
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise ConfigError(
            f"eval.tasks: the data of {names} could not be fetched: {said}\n"
            "  Submit from a machine that reaches the hub, or take the task out of eval.tasks. Where the nodes reach it themselves: "
            "hydra.launcher.offline=false."
        )
    _fetched(store).mkdir(parents=True, exist_ok=True)
    for one in wanted:
        files.write_json(_fetched(store) / _mark(one["task"]), {"task": one["task"]["name"], "cache": _cached(store)})


def _is_there(store: Store, task: dict[str, Any]) -> bool:
    """It was fetched, and nothing that the cache had then is gone: by hand, or because scratch is cleared by age."""
    try:
        mark = files.read_json(_fetched(store) / _mark(task))
    except FileNotFoundError:
        return False
    return set(mark["cache"]) <= set(_cached(store))


def _cached(store: Store) -> list[str]:
    """The repositories and datasets in the cache of the Hugging Face libraries: their folders."""
    return sorted(
        f"{part}/{name}"
        for part in ("hub", "datasets")
        if (store.hub / part).is_dir()
        for name in os.listdir(store.hub / part)
        if not name.startswith((".", "_"))
    )


def _fetched(store: Store) -> Path:
    # Beside what was fetched: another HF_HOME has not got it.
    return store.hub / "zexp-fetched"


def _mark(task: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(task).encode("ascii")).hexdigest()[:16]
