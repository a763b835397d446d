"""The `eval` stage: one task on one state, by lm-eval.

result/results.json {"task", "metrics": {name: {"value", "stderr", "n", "higher_is_better", "baseline"}}}
result/samples.jsonl {"item", name: value}: what paired tests compare; bits per byte as [bits, bytes].
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from zexp.store.attempt import Attempt
from zexp.store.files import read_json, write_json
from zexp.store.folder import StageFolder, Store

_loaded: dict[tuple[str, str, int, str, str], Any] = {}  # the last state's model: its evals run one after another


def run(store: Store, folder: StageFolder, request: dict[str, Any], attempt: Attempt) -> str:
    """Score the state with the task. request: threads, device, kernels, eval.batch_size."""
    semantic = folder.semantic()
    _offline(attempt.path / "datasets")
    import lm_eval
    import torch

    torch.set_num_threads(request["threads"])
    torch.use_deterministic_algorithms(request["deterministic"])
    device = request["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    from zexp.data import tokenizer
    from zexp.evaluate.model import ZexpLM

    tokenizer.one_thread()
    model, tokenizer_id = _model(store, semantic["state"], device, request["kernels"])
    language_model = ZexpLM(
        model,
        tokenizer.load(store, tokenizer_id),
        context_tokens=semantic["settings"]["context_tokens"],
        batch_size=request["eval"]["batch_size"],
        device=device,
        on_progress=lambda done, total: attempt.progress(done, total, "sequences"),
    )
    name, config = semantic["task"]["name"], _config(store, semantic)
    answer = lm_eval.simple_evaluate(
        model=language_model,
        tasks=[config],
        limit=semantic["settings"].get("limit"),
        log_samples=True,
        bootstrap_iters=0,  # intervals come from the samples
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
    )
    baselines = _baselines(store, semantic)
    metrics, samples = _results(name, config, answer, baselines)
    scratch = attempt.scratch("result")
    write_json(scratch / "results.json", {"task": name, "metrics": metrics})
    lines = (json.dumps(sample) + "\n" for sample in samples)
    (scratch / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    attempt.publish(scratch, "result")
    return "done"


def _offline(cache: Path) -> None:
    """Before datasets is imported: nothing is asked of a hub for documents that lie in the store."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["HF_DATASETS_CACHE"] = str(cache)


def _model(store: Store, state: dict[str, Any], device: str, kernels: str) -> tuple[Any, str]:
    from zexp.train.checkpoint import load_model

    key = (str(store.root), state["id"], state["tokens"], device, kernels)
    if key not in _loaded:
        model, _, tokenizer_id = load_model(store, state["id"], state["tokens"], device, kernels)
        _loaded.clear()
        _loaded[key] = (model, tokenizer_id)
    found: tuple[Any, str] = _loaded[key]
    return found


def _config(store: Store, semantic: dict[str, Any]) -> dict[str, Any]:
    """The task's YAML with the documents of its `tasks` stage."""
    config = dict(semantic["task"]["yaml"])
    if semantic["tasks"] is not None:
        result = store.folder("tasks", semantic["tasks"]).result
        assert result is not None, "a parent stage was published before this one started"
        split = config.get("test_split", "test")
        config["dataset_kwargs"] = {"data_files": {split: str(result / "documents.jsonl")}}
    return config


def _baselines(store: Store, semantic: dict[str, Any]) -> dict[str, Any]:
    if semantic["tasks"] is None:
        return {}
    result = store.folder("tasks", semantic["tasks"]).result
    assert result is not None
    found: dict[str, Any] = read_json(result / "baselines.json")
    return found


def _results(
    name: str, config: dict[str, Any], answer: dict[str, Any], baselines: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics and per-item values from lm-eval's answer."""
    items = answer["samples"][name]
    directions = {entry["metric"]: bool(entry.get("higher_is_better", True)) for entry in config.get("metric_list", [])}
    metrics: dict[str, Any] = {}
    samples: list[dict[str, Any]] = [{"item": str(item["doc"].get("id", item["doc_id"]))} for item in items]
    for key, value in answer["results"][name].items():
        metric = key.split(",")[0]
        if metric.endswith("_stderr") or not isinstance(value, int | float) or not items or metric not in items[0]:
            continue
        pairs = [_ratio(metric, item[metric]) for item in items]
        for sample, (numerator, denominator) in zip(samples, pairs, strict=True):
            sample[metric] = numerator if denominator is None else [numerator, denominator]
        metrics[metric] = {
            "value": float(value),
            "stderr": standard_error(pairs),
            "n": len(items),
            "higher_is_better": directions.get(metric, True),
        }
        if metric in baselines:
            metrics[metric]["baseline"] = baselines[metric]
    return metrics, samples


def _ratio(metric: str, value: Any) -> tuple[float, float | None]:
    """An item's value, or numerator and denominator where the metric is a ratio of sums (bits and bytes)."""
    if isinstance(value, list | tuple):
        log_likelihood, weight = value
        return -float(log_likelihood) / math.log(2), float(weight)
    return float(value), None


def standard_error(pairs: list[tuple[float, float | None]]) -> float | None:
    """Of a mean over items, or of a ratio of sums by the delta method (Cochran, Sampling Techniques, 1977, eq. 6.13).

    None for fewer than two items.
    """
    n = len(pairs)
    if n < 2:
        return None
    weights = [1.0 if weight is None else weight for _, weight in pairs]
    ratio = sum(value for value, _ in pairs) / sum(weights)
    spread = sum((value - ratio * weight) ** 2 for (value, _), weight in zip(pairs, weights, strict=True)) / (n - 1)
    return math.sqrt(spread / n) / (sum(weights) / n)
