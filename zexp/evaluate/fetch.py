"""Data that tasks would load from the Hugging Face hub, loaded ahead on a machine that reaches it.

Nodes of a cluster often do not. `python -m zexp.evaluate.fetch FILE` builds each task of FILE (JSON: a list of {task,
request}) as an evaluation would, so that what it loads is in HF_HOME, which the jobs get as well.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# dataset_path values that mean files of one's own; they are found from the directory of the plan.
LOCAL = ("json", "csv", "text", "parquet")


def loads(semantic: Mapping[str, Any]) -> bool:
    """True if an evaluation with this semantic block loads a dataset that is no local file and no stage of the plan."""
    task = semantic["task"]
    if task["yaml"] is None:
        return True
    return semantic["tasks"] is None and task["yaml"].get("dataset_path") not in (None, *LOCAL)


def build(task: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """Load a task's data into the cache. request: what an evaluation's request says under `eval`."""
    from zexp.evaluate.run import built

    with tempfile.TemporaryDirectory() as scratch:
        built(task, request, Path(scratch))


def main() -> int:
    logging.disable(logging.WARNING)
    for one in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print(f"fetching {one['task']['name']}", flush=True)
        build(one["task"], one["request"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
