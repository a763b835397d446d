"""What a person sees of `zexp calc`: tables of one architecture, or several side by side; and the same as one JSON object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from zexp.calc.budget import Budget
from zexp.config.tokens import say_tokens
from zexp.study.describe import describe
from zexp.study.resolve import Composed
from zexp.study.show import say_bytes, say_flops

COLUMN = 15  # characters of one architecture's column, its gap included
LABELS = 26  # of the column before them


def calc(composed: Sequence[Composed], budget: Budget | None, *, as_json: bool) -> int:
    """Print what the composed architectures cost, or what the budget trains of them; exit code 0. Raises ConfigError."""
    answers = describe(composed, budget)
    if as_json:
        print(json.dumps(answers[0] if len(answers) == 1 else {"architectures": answers}))
        return 0
    console = Console(highlight=False)
    for answer in answers:
        if answer["match"] is not None:
            console.print(f"{answer['name']} matched: {answer['match']['line']}")
    if len(answers) > 1:
        _print_side_by_side(answers, console)
        return 0
    if budget is not None:
        _print_budget(answers[0], console)
        return 0
    _print_one(answers[0], console)
    return 0


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=number > 0)
    return table


def _print_one(answer: dict[str, Any], console: Console) -> None:
    parameters, flops = answer["parameters"], answer["flops_per_token"]
    title = (
        f"{answer['arch']}: {answer['layers']} layers of width {answer['width']}, sequence length {answer['seq_len']}, "
        f"vocabulary {answer['vocab_size']}"
    )
    console.print(title, style="bold")
    table = _table("block", "count", "parameters", "forward/token", "kept/token", "KV/token", "state")
    rows = answer["blocks"]
    for row in rows:
        name = f"{row['name']} ({row['letter']})" if row["letter"] else row["name"]
        table.add_row(name, *_figures(row, str(row["count"])))
    whole = {key: sum(row[key] for row in rows) for key in ("flops", "saved_bytes_per_token", "kv_bytes", "state_bytes")}
    table.add_row("all", *_figures({**whole, "parameters": parameters["total"]}, ""), style="bold")
    console.print(table)
    active = "" if parameters["active"] == parameters["total"] else f"{parameters['active']:,} active a token, "
    console.print(f"Parameters: {parameters['total']:,}, {active}{parameters['embedding']:,} in embedding and head.")
    console.print(
        f"Training: {say_flops(flops['train'], 4)} a token, {flops['train'] / (6 * parameters['total']):.2f} × 6N; "
        f"{say_flops(flops['train_recomputed'], 4)} if the forward pass is computed again."
    )
    console.print()
    _print_memory(answer, console)


def _figures(row: dict[str, Any], count: str) -> list[str]:
    sizes = [say_bytes(row[key]) if row[key] else "" for key in ("saved_bytes_per_token", "kv_bytes", "state_bytes")]
    parameters = f"{row['parameters']:,}" if row["parameters"] else ""
    return [count, parameters, say_flops(row["flops"], 4) if row["flops"] else "", *sizes]


def _print_memory(answer: dict[str, Any], console: Console) -> None:
    training, inference = answer["memory"]["training"], answer["memory"]["inference"]
    console.print(f"Training, {_layout(training)}: bytes on each device", style="bold")
    table = _table("weights", "gradients", "optimizer", "activations", "all")
    keys = ("weights", "gradients", "optimizer", "activations", "total")
    table.add_row(*(say_bytes(training[key]) for key in keys))
    console.print(table)
    console.print()
    console.print(f"Decoding one sequence in bf16, weights {say_bytes(inference['weights'])}", style="bold")
    table = _table("context", "cache", "with weights", "FLOPs/token", "bytes read/token")
    for row in inference["contexts"]:
        cells = (say_bytes(row["cache"]), say_bytes(row["total"]), say_flops(row["flops"]), say_bytes(row["bytes"]))
        table.add_row(f"{row['context']:,}", *cells)
    console.print(table)
    state = answer["memory"]["state"]
    console.print(f"A state takes {say_bytes(state['full'])} on disk, its weights {say_bytes(state['weights'])} (fp32).")


def _layout(training: dict[str, Any]) -> str:
    layout, devices = training["layout"], training["devices"]
    parts = [training["precision"], f"micro-batches of {training['micro_batch']}", f"{devices} device{'s' * (devices != 1)}"]
    parts += [f"ZeRO-{layout['zero']}"] * (layout["zero"] > 0)
    parts += [f"{name}-parallel {layout[name]}" for name in ("tensor", "expert") if layout[name] > 1]
    parts += ["activations computed again"] * (layout["checkpointing"] == "full")
    return ", ".join(parts)


def _print_budget(answer: dict[str, Any], console: Console) -> None:
    budget, training = answer["budget"], answer["memory"]["training"]
    console.print(
        f"{budget['gpus']} × {budget['device']} for {budget['days']:g} days at {budget['mfu']:.0%} of "
        f"{say_flops(budget['peak_flops_per_second'])}/s in {budget['peak']} ({budget['source']}): "
        f"{say_flops(budget['flops'])}."
    )
    console.print(
        f"{answer['arch']}, {answer['parameters']['total']:,} parameters, {say_flops(answer['flops_per_token']['train'])} a token at "
        f"sequence length {answer['seq_len']}: {say_tokens(budget['tokens'])} tokens, "
        f"{_say_ratio(budget['tokens_per_parameter'])} a parameter, {say_tokens(budget['tokens_per_second'])} a second. "
        f"20 tokens a parameter would take {_say_ratio(budget['days_for_20_tokens_per_parameter'])} days."
    )
    fits = "of" if budget["fits"] else "which is more than the"
    hint = "" if budget["fits"] else " Try parallelism.zero=1 to 3, parallelism.tensor or activation_checkpointing=full."
    console.print(
        f"Memory: {say_bytes(training['total'])} on each device ({_layout(training)}), {fits} "
        f"{say_bytes(budget['device_memory'])} that it has.{hint}"
    )


def _say_ratio(value: float) -> str:
    """Three digits, without an exponent for large values."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _print_side_by_side(answers: Sequence[dict[str, Any]], console: Console) -> None:
    """Architectures as columns where they fit, else as rows with fewer figures."""
    seq_lens = {answer["seq_len"] for answer in answers}
    names = [answer["name"] for answer in answers]
    lengths = [{row["context"] for row in answer["memory"]["inference"]["contexts"]} for answer in answers]
    figures = [_compared(answer, set.intersection(*lengths)) for answer in answers]
    shared = f"Sequence length {seq_lens.pop()}" if len(seq_lens) == 1 else "Each at its sequence length"
    training = answers[0]["memory"]["training"]
    console.print(f"{shared}; training memory: {_layout(training)}; decoding in bf16", style="bold")
    if LABELS + max(COLUMN, *(len(name) + 2 for name in names)) * len(answers) <= console.width:
        table = _table("", *names)
        for label in figures[0]:
            table.add_row(label, *(figure[label] for figure in figures))
        console.print(table)
        return
    _print_rows(answers, figures, console)


def _print_rows(answers: Sequence[dict[str, Any]], figures: Sequence[dict[str, str]], console: Console) -> None:
    """A row for each architecture; where the names are too long for that, each name on a line above its figures."""
    columns = {
        "params": [figure["parameters"] for figure in figures],
        "active\nparams": [figure["active"] for figure in figures],
        "training\nper token": [say_flops(answer["flops_per_token"]["train"]) for answer in answers],
        "train\nmemory": [figure["training memory"] for figure in figures],
    }
    if "tokens" in figures[0]:
        shown = {"tokens": "tokens", "per\nparam": "tokens/parameter"}
    else:
        shown = {"KV/\ntoken": "KV/token", "state": "state", "at\n32,768": "with weights at 32768"}
    columns |= {title: [figure[key] for figure in figures] for title, key in shown.items()}
    titles = [title.split("\n") for title in columns]
    heads = zip(*([""] * (2 - len(lines)) + lines for lines in titles), strict=True)
    rows = list(zip(*columns.values(), strict=True))
    widths = [max(map(len, (*lines, *cells))) for lines, cells in zip(titles, columns.values(), strict=True)]
    names = [answer["name"] for answer in answers]
    first = max(map(len, names))
    above = first + sum(widths) + 2 * len(widths) > console.width
    indent = 0 if above else first

    def line(name: str, cells: Sequence[str]) -> str:
        return name.ljust(indent) + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    for head in heads:
        console.print(line("", head), style="bold", markup=False)
    for name, row in zip(names, rows, strict=True):
        if above:
            console.print(name, markup=False)
        console.print(line("" if above else name, row), markup=False)


def _compared(answer: dict[str, Any], contexts: set[int]) -> dict[str, str]:
    """Every figure of the comparison by its label. contexts: those that all of the compared have."""
    parameters, flops = answer["parameters"], answer["flops_per_token"]
    training, inference = answer["memory"]["training"], answer["memory"]["inference"]
    figures = {
        "parameters": say_tokens(parameters["total"]),
        "active": say_tokens(parameters["active"]),
        "embedding and head": say_tokens(parameters["embedding"]),
        "layers × width": f"{answer['layers']} × {answer['width']}",
        "forward FLOPs/token": say_flops(flops["forward"], 4),
        "training FLOPs/token": say_flops(flops["train"], 4),
        "with recomputation": say_flops(flops["train_recomputed"], 4),
        "training memory": say_bytes(training["total"]),
        "  of it activations": say_bytes(training["activations"]),
        "weights, decoding": say_bytes(inference["weights"]),
        "KV/token": say_bytes(inference["kv_bytes_per_token"]),
        "state": say_bytes(inference["state_bytes"]),
    }
    rows = [row for row in inference["contexts"] if row["context"] in contexts]
    for row in rows:
        figures[f"with weights at {row['context']}"] = say_bytes(row["total"])
    for row in rows:
        figures[f"decode FLOPs at {row['context']}"] = say_flops(row["flops"])
    for row in rows:
        figures[f"bytes read at {row['context']}"] = say_bytes(row["bytes"])
    if "budget" in answer:
        budget = answer["budget"]
        figures["budget FLOPs"] = say_flops(budget["flops"])
        figures["tokens"] = say_tokens(budget["tokens"])
        figures["tokens/parameter"] = _say_ratio(budget["tokens_per_parameter"])
        figures["fits the device"] = "yes" if budget["fits"] else "no"
    return figures
