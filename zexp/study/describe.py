"""Composed configs to what `zexp calc` says of them: one answer for each architecture, as the JSON has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from zexp.blocks.resolve import specs_of
from zexp.calc import match, memory
from zexp.calc import model as calc
from zexp.calc.budget import Budget
from zexp.calc.layout import Layout
from zexp.config.errors import ConfigError, Problems
from zexp.config.identity import semantic_dict
from zexp.config.schema import Run
from zexp.study.resolve import Composed, layout_of, vocab_size
from zexp.study.variants import row_of

ELEMENT_BYTES = 2  # of weights and caches in decoding: bf16


def describe(composed: Sequence[Composed], budget: Budget | None = None) -> list[dict[str, Any]]:
    """The answers, each architecture (at its sequence length, layout and precision) once.

    budget: what is asked of `zexp calc budget`; its accelerators are the data-parallel copies, and its peak the precision.
    Raises ConfigError with every mistake of every config.
    """
    problems = Problems()
    problems.extend([] if budget is None else budget.problems())
    answers: list[dict[str, Any]] = []
    for one in composed:
        try:
            answer = _describe(_name(one), one.choices.get("arch"), one.run(), budget, problems)
        except ConfigError as error:
            problems.extend(error.problems)
            continue
        if answer is not None and answer not in answers:  # a study's variants share architectures
            answers.append(answer)
    problems.raise_if_any()
    return answers


def _name(one: Composed) -> str:
    """The architecture with the values of those axes that change what it costs."""
    axes = {
        key: value
        for key, value in one.axes.items()
        if key in ("arch", "seq_len", "precision", "parallelism", "scale")
        or key.startswith(("arch.", "parallelism.", "execution.", "corpus.tokenizer."))
    }
    arch = one.choices.get("arch") or "arch"
    return row_of(axes if "arch" in axes else {"arch": arch, **axes}, arch, None)


def _describe(
    name: str, arch: str | None, run: Run, budget: Budget | None, problems: Problems
) -> dict[str, Any] | None:
    layout = layout_of(run) if budget is None else _budgeted(layout_of(run), budget, problems)
    precision = run.precision if budget is None else {"tf32": "fp32", "fp32": "fp32"}.get(budget.peak, "bf16")
    found = len(problems.texts)
    for key, value in (("seq_len", run.seq_len), ("execution.micro_batch", run.execution.micro_batch)):
        if value < 1:
            problems.add(f"{key} = {value}: it must be at least 1.")
    if precision not in memory.PER_PARAMETER:
        problems.add(f"precision = {run.precision!r}; it is {' or '.join(memory.PER_PARAMETER)}.")
    try:
        model, matched = match.resolve(semantic_dict(run.arch), vocab_size(run, Path.cwd()), run.seq_len)
    except ConfigError as error:
        problems.extend([*error.problems, *layout.problems(None)])
        return None
    problems.extend(layout.problems(model))
    if len(problems.texts) > found or (budget is not None and budget.problems()):
        return None
    training = memory.training(
        model,
        layout,
        seq_len=run.seq_len,
        micro_batch=run.execution.micro_batch,
        precision=precision,
    )
    parameters, flops = calc.parameters(model), calc.flops_per_token(model, run.seq_len)
    answer = {
        "arch": arch,
        "name": name,
        "seq_len": run.seq_len,
        "vocab_size": model["vocab_size"],
        "width": model["width"],
        "layers": len(model["pattern"]),
        "match": None if matched is None else matched.to_json() | {"line": matched.line()},
        "parameters": parameters,
        "flops_per_token": flops,
        "memory": {
            "training": {
                **training.to_json(),
                "devices": layout.devices,
                "layout": asdict(layout),
                "precision": precision,
                "micro_batch": run.execution.micro_batch,
            },
            "inference": {
                "weights": ELEMENT_BYTES * parameters["total"],
                "kv_bytes_per_token": calc.kv_bytes_per_token(model, ELEMENT_BYTES),
                "state_bytes": calc.state_bytes(model, ELEMENT_BYTES),
                "contexts": memory.inference(model, run.seq_len, ELEMENT_BYTES),
            },
            "state": calc.checkpoint_bytes(model),
        },
        "blocks": _blocks(model, run.seq_len, precision),
    }
    if budget is not None:
        answer["budget"] = budget.answer(parameters, flops["train"], training.total)
    return answer


def _budgeted(layout: Layout, budget: Budget, problems: Problems) -> Layout:
    """The layout over all accelerators of the budget: as many copies as there are groups of tensor-parallel ones."""
    if layout.tensor < 1 or budget.gpus < 1:
        return layout
    if budget.gpus % layout.tensor or layout.data not in (1, budget.gpus // layout.tensor):
        problems.add(
            f"gpus = {budget.gpus}: parallelism.tensor = {layout.tensor} and parallelism.data = {layout.data} make "
            f"{layout.devices} devices. Leave parallelism.data at 1, and choose a divisor of {budget.gpus} for parallelism.tensor."
        )
        return layout
    return replace(layout, data=budget.gpus // layout.tensor)


def _blocks(model: dict[str, Any], seq_len: int, precision: str) -> list[dict[str, Any]]:
    """The rows of the block table, with their training FLOPs, and what they keep for the backward pass in bytes a token."""
    specs = specs_of(model)
    rows = []
    for row in calc.block_table(model, seq_len, ELEMENT_BYTES):
        kept = 0.0
        if row.letter is not None:
            kept = row.count * memory.saved_bytes(specs[row.letter], model["width"], seq_len, precision)
        trained = calc.TRAIN_PER_FORWARD * row.flops
        rows.append(asdict(row) | {"train_flops": trained, "saved_bytes_per_token": kept})
    return rows
