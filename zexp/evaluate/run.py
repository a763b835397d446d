"""The `eval` stage: one state, one task.

    result/results.json   result/samples.jsonl   result/manifest.json

Several evaluations of one state may run in one process, one after the other: the model and lm-eval (3 s to import) stay.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import logging
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from zexp.data import tokenizer as tokenizers
from zexp.evaluate import results
from zexp.evaluate.fetch import LOCAL
from zexp.evaluate.tasks import BASELINES, DOCUMENTS
from zexp.store import files
from zexp.store.attempt import Attempt
from zexp.store.errors import StoreError
from zexp.store.folder import StageFolder, Store
from zexp.train.checkpoint import load_model
from zexp.train.fingerprint import device_model
from zexp.train.machine import settled

_FUNCTION = "!function "
FEWSHOT_SEED = 1234  # lm-eval's own default, as are those of _seed


@dataclass
class _Loaded:
    """The model of the last evaluation, for the next."""

    key: tuple[str, str, int, str, str]
    model: Any
    tokenizer: Any
    eod_id: int


_loaded: _Loaded | None = None


def run(store: Store, folder: StageFolder, request: dict[str, Any], attempt: Attempt) -> str:
    """The stage. request: threads, device, kernels, deterministic, eval {batch_size, yaml, directory, index}."""
    semantic = folder.semantic()
    started = time.monotonic()
    with settled(request["threads"], request["deterministic"]), _quiet():
        from lm_eval.evaluator import evaluate

        from zexp.evaluate.model import Adapter

        loaded = _load(store, semantic["state"], request)
        adapter = Adapter(
            loaded.model,
            loaded.tokenizer,
            context_tokens=semantic["settings"]["context_tokens"],
            batch_size=request["eval"]["batch_size"],
            eod_id=loaded.eod_id,
            on_progress=lambda done, total: _progress(attempt, done, total),
        )
        _seed()
        tasks, group = _tasks(store, semantic, request, attempt)
        for task in tasks["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        limit = semantic["settings"].get("limit")
        # lm-eval's own errors are bootstrapped 100,000 times: seconds a metric. results.py has closed forms.
        found = evaluate(lm=adapter, task_dict=tasks, limit=limit, bootstrap_iters=0, log_samples=True)
        assert found is not None, "one process evaluates, so it has the results"
    made, lines = _collect(store, semantic, found, group)
    scratch = attempt.scratch("eval")
    facts = {
        "task": semantic["task"]["name"],
        **made,
        "settings": semantic["settings"],
        "lm_eval": importlib.metadata.version("lm_eval"),
        "seconds": round(time.monotonic() - started, 3),
        "device": device_model(loaded.key[3]),
        "threads": request["threads"],
    }
    files.write_json(scratch / "results.json", facts)
    files.write_atomic(scratch / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    attempt.publish(scratch, "result")
    return "done"


def _tasks(store: Store, semantic: Mapping[str, Any], request: Mapping[str, Any], attempt: Attempt) -> tuple[Any, bool]:
    """(lm-eval's task dict, whether the name is of several tasks)."""
    documents = None if semantic["tasks"] is None else _documents(store, semantic["tasks"])
    return built(semantic["task"], request["eval"], attempt.scratch("datasets"), documents)


def built(
    task: Mapping[str, Any], own: Mapping[str, Any], cache: Path, documents: list[dict[str, Any]] | None = None
) -> tuple[Any, bool]:
    """The same of a task alone; its data is loaded by that. own: request["eval"]; cache: a folder for what `datasets` makes of
    local files; documents: those of a task whose documents a stage has made."""
    if task["yaml"] is None:
        return _lm_evals_own(task, own["index"])
    import datasets
    from lm_eval.api.task import ConfigurableTask

    config = _resolved(task["yaml"], Path(own["yaml"]).parent)
    if documents is not None:
        made = {config["test_split"]: datasets.Dataset.from_list(documents)}
        config["custom_dataset"] = lambda **_: made
    else:
        config["dataset_kwargs"] = _local_kwargs(config, Path(own["directory"]), cache)
        _check_files(task, Path(own["yaml"]).parent, Path(own["directory"]))
    build = config.get("class", ConfigurableTask)
    metadata = config.get("metadata")
    # custom_dataset is called with the metadata as keyword arguments, and any task may have them printed.
    config["metadata"] = (
        {"version": metadata["version"]} if isinstance(metadata, dict) and "version" in metadata else {}
    )
    with _offline() if documents is not None or config.get("dataset_path") in LOCAL else nullcontext():
        return {"tasks": {task["name"]: build(config=config)}}, False


def _lm_evals_own(task: Mapping[str, Any], index: str) -> tuple[Any, bool]:
    """A task, group or tag that lm-eval brings. index: where, as names.lm_eval_names says."""
    version = importlib.metadata.version("lm_eval")
    if version != task["lm_eval"]:
        raise StoreError(
            f"{task['name']} was planned with lm-eval {task['lm_eval']}, and {version} is installed. Plan again."
        )
    from lm_eval.tasks import TaskManager

    from zexp.evaluate.names import lm_eval_folder

    if ":" in index:  # a group or tag names tasks that may lie anywhere: lm-eval's own index, 7 to 14 s
        return TaskManager().load([task["name"]]), True
    beside = (lm_eval_folder() / index).parent
    return TaskManager(include_path=str(beside), include_defaults=False).load([task["name"]]), False


def _documents(store: Store, tasks_id: str) -> list[dict[str, Any]]:
    folder = store.folder("tasks", tasks_id)
    if folder.result is None:
        raise StoreError(f"{folder.path} has no result: the documents of this task are not built.")
    with (folder.result / DOCUMENTS).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _collect(
    store: Store, semantic: Mapping[str, Any], found: Mapping[str, Any], group: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """({metrics, …} of results.json, lines of samples.jsonl).

    A group or tag has its own metrics, where lm-eval aggregates any, and each task's as task.metric.
    """
    task = semantic["task"]
    zexp = ((task["yaml"] or {}).get("metadata") or {}).get("zexp") or {}
    baselines = _baselines(store, semantic["tasks"])
    if not group:
        name = next(iter(found["samples"]))
        metrics, lines = results.metrics_of(
            task["name"],
            found["results"][name],
            found["samples"][name],
            found["higher_is_better"].get(name, {}),
            zexp.get("report_as", {}),
            baselines,
        )
        return {"metrics": metrics, "version": found["versions"].get(name)}, lines
    metrics, lines = {}, []
    whole = found["results"].get(task["name"])
    if whole is not None:
        metrics, _ = results.metrics_of(
            task["name"], whole, [], found["higher_is_better"].get(task["name"], {}), {}, {}
        )
        n = whole.get("sample_len") or sum(len(samples) for samples in found["samples"].values())
        for metric in metrics.values():
            metric["n"] = n
    for name, samples in found["samples"].items():
        own, rows = results.metrics_of(
            name, found["results"][name], samples, found["higher_is_better"].get(name, {}), {}, {}
        )
        metrics.update({f"{name}.{metric}": value for metric, value in own.items()})
        for row in rows:
            item = row.pop("item")
            lines.append({"item": f"{name}.{item}", **{f"{name}.{metric}": value for metric, value in row.items()}})
    return {"metrics": metrics, "version": {name: found["versions"].get(name) for name in found["samples"]}}, lines


def _baselines(store: Store, tasks_id: str | None) -> dict[str, Any]:
    if tasks_id is None:
        return {}
    result = store.folder("tasks", tasks_id).result
    assert result is not None, "the documents were read from there"
    found: dict[str, Any] = files.read_json(result / BASELINES)
    return found


def _load(store: Store, state: Mapping[str, Any], request: Mapping[str, Any]) -> _Loaded:
    """The state's model and tokenizer; those of the last evaluation if they are the same."""
    global _loaded
    device = request["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    key = (str(store.root), state["id"], state["tokens"], device, request["kernels"])
    if _loaded is None or _loaded.key != key:
        _loaded = None  # before the next one needs the memory
        tokenizers.one_thread()
        model, _, tokenizer_id = load_model(store, state["id"], state["tokens"], device, request["kernels"])
        _loaded = _Loaded(key, model, tokenizers.load(store, tokenizer_id), tokenizers.eod_id(store, tokenizer_id))
    return _loaded


def _resolved(value: Any, folder: Path) -> Any:
    """A YAML's content with its !function texts replaced by the functions (or classes) that they name.

    `!function module.name`: module.py beside the YAML, else an importable module.
    """
    if isinstance(value, dict):
        return {key: _resolved(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, folder) for item in value]
    if isinstance(value, str) and value.startswith(_FUNCTION):
        module, _, name = value.removeprefix(_FUNCTION).rpartition(".")
        file = folder / f"{module.replace('.', '/')}.py"
        return getattr(_module_of(file) if file.is_file() else importlib.import_module(module), name)
    return value


def _module_of(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"zexp_user_task_{file.stem}", file)
    assert spec is not None and spec.loader is not None, "it is a .py file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _local_kwargs(config: Mapping[str, Any], directory: Path, cache: Path) -> dict[str, Any]:
    """dataset_kwargs with data_files found from the directory of the plan, and a cache that goes with the attempt."""
    kwargs = dict(config.get("dataset_kwargs") or {})
    if "data_files" in kwargs:
        kwargs["data_files"] = _absolute(kwargs["data_files"], directory)
        kwargs["cache_dir"] = str(cache)
    return kwargs


def _absolute(value: Any, directory: Path) -> Any:
    if isinstance(value, str):
        return str(directory / value)
    if isinstance(value, list):
        return [_absolute(item, directory) for item in value]
    return {key: _absolute(item, directory) for key, item in value.items()}


def _check_files(task: Mapping[str, Any], beside: Path, directory: Path) -> None:
    """Raises StoreError if a file that the id was made of is another by now."""
    for name, known in task.get("files", {}).items():
        path = beside / name if name.endswith(".py") else directory / name
        if not path.is_file() or files.sha256_file(path) != known["sha256"]:
            raise StoreError(f"{path} is no longer the file that was planned with. Plan again.")


def _seed() -> None:
    """Some of lm-eval's tasks draw their documents or choices from the global generators."""
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)


def _progress(attempt: Attempt, done: int, total: int) -> None:
    attempt.progress(done, total, "sequences")
    attempt.check()


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's advice left out; its errors stay."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _offline() -> Iterator[None]:
    """No look at the hub while a task with data of its own is made: datasets counts downloads there."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
