"""What a person sees of a plan; and the same as one JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from zexp.config.tokens import say_tokens
from zexp.store.folder import Store
from zexp.study import nearest
from zexp.study.plan import Plan, Stage, bins_known, ledger_of

if TYPE_CHECKING:
    from zexp.study.outlook import Outlook


def say_bytes(size: float) -> str:
    """1536 -> '1.5 KB', in powers of 1,000."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"


def say_flops(flops: float, digits: int = 3) -> str:
    """Floating-point operations with a unit, e.g. '18.3 TFLOP'."""
    for unit, factor in (("ZFLOP", 1e21), ("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if flops >= factor:
            return f"{flops / factor:.{digits}g} {unit}"
    return f"{flops / 1e6:.{digits}g} MFLOP"


def plan(the_plan: Plan, study: Mapping[str, Any], store: Store, outlook: Outlook, *, as_json: bool) -> None:
    """Print a plan: the tree, what is cached, what it costs. JSON is one object and nothing else."""
    if as_json:
        said = {"study": study["name"], "store": str(store.root), **the_plan.to_json(), **outlook.to_json()}
        nothing = {"seconds": None, "source": None, "basis": None}  # of a stage that is not to do
        for stage in said["stages"]:
            estimate = outlook.estimates.get(stage["id"])
            stage.update(nothing if estimate is None else estimate.to_json())
        print(json.dumps(said))
        return
    console = Console(highlight=False)
    tree = Tree(f"[bold]{study['name']}[/bold]" + (f"  {study['question']}" if study.get("question") else ""))
    data = tree.add("data")
    for stage in the_plan.stages.values():
        if stage.kind in ("tokenizer", "corpus", "packing", "tasks"):
            data.add(f"{_mark(stage)} {stage.label}  [dim]{stage.id}[/dim]")
    nodes: dict[str, Tree] = {}
    scored = the_plan.evals_of()
    for stage in the_plan.stages.values():
        if stage.kind == "segment":
            parent = nodes.get(stage.parents[0], tree) if stage.parents else tree
            nodes[stage.id] = parent.add(_segment_line(stage, scored.get(stage.id, [])))
    console.print(tree)
    _print_ledger(console, the_plan, store)
    for line in dict.fromkeys(f"{v.arch} matched: {v.match.line()}" for v in the_plan.variants if v.match is not None):
        console.print(line)
    for line in nearest.lines(outlook.nearest):
        console.print(line, markup=False)  # names and keys may have brackets
    console.print(_summary(the_plan))
    for line in outlook.lines():
        console.print(line, markup=False)
    for text in outlook.warnings():
        console.print(f"Warning: {text}", style="yellow", markup=False)
    console.print("Nothing was started.")


def _mark(stage: Stage) -> str:
    if stage.cached:
        return "[green]✓[/green]"
    if stage.diverged is not None:
        return "[red]diverged[/red]"
    return "·" if stage.needed else "[dim]not needed[/dim]"


def _segment_line(stage: Stage, evals: list[Stage]) -> str:
    lr = stage.semantic["lr"]
    last = lr[-1]
    rate = f"LR {last['start']:.3g}" + ("" if last["shape"] == "constant" else f" → {last['end']:.3g} {last['shape']}")
    line = (
        f"{_mark(stage)} {stage.label}  {say_tokens(stage.start or 0)} → {say_tokens(stage.to or 0)}  {rate}  "
        f"[dim]{stage.id}[/dim]"
    )
    if stage.resume_from is not None:
        line += f"  resumes at {say_tokens(stage.resume_from)}"
    if last["to"] is not None and last["shape"] != "constant" and stage.semantic["parent"] is None:
        line += "  [dim]cannot be extended[/dim]"
    if evals:
        done = sum(e.cached for e in evals)
        line += f"  evals {done}/{len(evals)}"
    return line


def _print_ledger(console: Console, the_plan: Plan, store: Store) -> None:
    table = Table(title="tokens and epochs per source", title_justify="left", box=None, pad_edge=False)
    for name in ("variants", "source", "tokens", "epochs", "replayed"):
        table.add_column(name, justify="left" if name in ("variants", "source") else "right")
    rows: dict[tuple[str, ...], list[str]] = {}
    for variant in the_plan.variants:
        book = ledger_of(variant, bins_known(the_plan, variant, store))
        for account in book.packings:
            epochs = f"{'' if account.exact else '≥ '}{account.epochs:.3g}"
            key = (account.name, say_tokens(account.tokens), epochs, say_tokens(account.replayed))
            rows.setdefault(key, []).append(variant.name)
    for figures, names in rows.items():
        table.add_row(names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""), *figures)
    console.print(table)


def _summary(the_plan: Plan) -> str:
    tokens, flops = the_plan.tokens(), the_plan.train_flops()
    pretrainings, anneals = len(the_plan.ends(False)), len(the_plan.ends(True))
    count = len(the_plan.variants)
    text = f"{count} variant{'s' * (count != 1)}: {pretrainings} pretraining{'s' * (pretrainings != 1)}"
    shared = ", shared," if anneals > pretrainings else ""
    text += f"{shared} and {anneals} anneal{'s' * (anneals != 1)}. " if anneals else ". "
    text += (
        f"{say_tokens(tokens['to_train'])} tokens to train ({say_tokens(tokens['unshared'])} unshared), "
        f"{say_flops(flops['to_train'])}; at most {say_bytes(the_plan.disk_bytes())} of disk."
    )
    return text
