"""What a person sees of a store: rich tables that are read on 80 columns, and sentences with what to type next."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zexp.config.errors import ConfigError
from zexp.config.tokens import say_tokens
from zexp.store.folder import Store
from zexp.store.inventory import Inventory
from zexp.store.sizes import Size, total
from zexp.store.verification import Damage
from zexp.study import gc
from zexp.study.recorded import Record
from zexp.study.show import say_bytes

if TYPE_CHECKING:
    from zexp.study.holdings import Row, Usage
    from zexp.study.share import Imported

STYLE = {"done": "", "missing": "dim", "running": "cyan", "diverged": "magenta", "failed": "red"}
WIDE = 120  # columns from which on each fact has a column of its own
SHOWN = 12  # lines of a list that may be long


def ls(inventory: Inventory, rows: list[Row], study: str | None) -> None:
    """A table a kind."""
    console = Console(highlight=False)
    if not rows:
        what = "No such stage" if inventory.stages else "No stage"
        console.print(f"{what} in {inventory.store.root}.", soft_wrap=True)
        _list_strays(console, inventory)
        return
    wide = console.width >= WIDE
    one_study = len({tuple(row.studies) for row in rows}) == 1 and not any(row.earlier or row.orphan for row in rows)
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind]
        size = total([row.seen.size for row in of_kind if row.seen is not None])
        console.print(f"[bold]{kind}[/bold]  {_count(len(of_kind), 'stage')}, {say_bytes(size.disk)}")
        table = Table(box=None, pad_edge=False)
        table.add_column("id", no_wrap=True)
        table.add_column("what", overflow="fold", ratio=3)
        if wide:
            table.add_column("holds", overflow="fold", ratio=2)
            table.add_column("studies", overflow="fold", ratio=1)
        table.add_column("status", no_wrap=True)
        table.add_column("size", justify="right", no_wrap=True)
        table.add_column("used", justify="right", no_wrap=True)
        for row in of_kind:
            holds, named = row.holds, _named(row)
            what = escape(row.label)
            below = "; ".join(text for text in (holds if holds != "result" else "", "" if one_study else named) if text)
            middle = [what, holds, named] if wide else [f"{what}\n[dim]{below}[/dim]" if below else what]
            size_text = say_bytes(row.seen.size.disk) if row.seen is not None else "–"
            used = _ago(time.time() - row.seen.used) if row.seen is not None else "–"
            table.add_row(row.id, *middle, row.status, size_text, used, style=STYLE[row.status])
        console.print(table)
        console.print()
    _list_strays(console, inventory)
    seen = [row.seen.size for row in rows if row.seen is not None]
    orphans = [row for row in rows if row.orphan]
    text = f"{_count(len(rows), 'stage')}, {say_bytes(total(seen).disk)}"
    if one_study and study is None:
        text += f", all named by {escape(', '.join(rows[0].studies))}"
    if orphans:
        freed = total([row.seen.size for row in orphans if row.seen is not None]).disk
        text += f"; {len(orphans)} of no study ({say_bytes(freed)}): zexp store gc --orphans"
    console.print(f"{text}.", soft_wrap=True)
    if any(row.kind == "trajectory" for row in rows):
        console.print(
            "States by tokens; ~ rolling, there to resume from; weights: without the optimizer; elsewhere: in another store.",
            style="dim", soft_wrap=True,
        )  # fmt: skip


def du(store: Store, usage: Usage, study: str | None) -> None:
    """By kind, by study, and what could be freed."""
    console = Console(highlight=False)
    where = f"{study} in {store.root}" if study else str(store.root)
    console.print(f"{where}: {say_bytes(usage.total.disk)} on disk, {say_bytes(usage.total.apparent)} of content.", soft_wrap=True)
    console.print("\n[bold]by kind[/bold]")
    table = _sizes("stages")
    for kind, (count, size) in usage.kinds.items():
        _size_row(table, kind, size, str(count))
        if kind == "trajectory":
            for part, own in usage.states.items():
                _size_row(table, f"  {part}", own, "")
    for name, size in usage.other.items():
        _size_row(table, f"{name}/", size, "")
    console.print(table)
    if usage.studies:
        console.print("\n[bold]by study, with what it is made from[/bold]")
        table = Table(box=None, pad_edge=False)
        for name in ("", "disk", "alone", "shared"):
            table.add_column(name, justify="left" if not name else "right", overflow="fold", no_wrap=bool(name))
        for name, (whole, own) in sorted(usage.studies.items(), key=lambda item: -item[1][0].disk):
            table.add_row(escape(name), say_bytes(whole.disk), say_bytes(own.disk), say_bytes(whole.disk - own.disk))
        console.print(table)
    table = _sizes(None)
    for what, size in usage.freeable.items():
        _size_row(table, what, size, None)
    if usage.freeable:
        console.print("\n[bold]what could be freed[/bold]")
        console.print(table)
        console.print("zexp store gc says what of it can go now, and why.", style="dim")


def verified(
    stages: int, published: int, size: int, quick: bool, damages: list[Damage], moved: list[Damage], not_moved: dict[str, str]
) -> None:
    """What is damaged and what to do; or that nothing is."""
    console = Console(highlight=False)
    for damage in damages:
        console.print(f"[red]{escape(damage.stage)}/{escape(damage.place)}[/red]  {escape(damage.problem)}", soft_wrap=True)
        if damage in moved:
            console.print("  set aside: the next run of a study that names it makes it again", soft_wrap=True)
        elif (why := not_moved.get(f"{damage.stage}/{damage.place}")) is not None:
            console.print(f"  not set aside: {escape(why)}", soft_wrap=True)
        else:
            console.print(f"  {escape(damage.advice)}", soft_wrap=True)
    how = "names and sizes compared" if quick else f"{say_bytes(size)} compared with their checksums"
    result = f"[red]{len(damages)} damaged[/red]" if damages else "all whole"
    console.print(f"{_count(stages, 'stage')}, {_count(published, 'published folder')}, {how}: {result}.", soft_wrap=True)


def collected(store: Store, decision: gc.Decision, done: gc.Done | None, options: argparse.Namespace) -> None:
    """What would go, or what went."""
    console = Console(highlight=False)
    drops = decision.drops if done is None else done.dropped
    for reason, text in gc.WHY.items():
        of_reason = [drop for drop in drops if drop.reason == reason]
        if not of_reason:
            continue
        size, again = total([drop.size for drop in of_reason]), sum(drop.again for drop in of_reason)
        cost = f", {say_tokens(again)} tokens to train them again" if again else ""
        console.print(f"[bold]{text}[/bold]  {len(of_reason)}, {say_bytes(size.disk)}{cost}", soft_wrap=True)
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(overflow="fold", ratio=1)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        largest = sorted(of_reason, key=lambda drop: -drop.size.disk)
        for drop in largest[:SHOWN]:
            again_text = f"{say_tokens(drop.again)} tokens" if drop.again else ""
            table.add_row(f"  {drop.path.relative_to(store.root).as_posix()}", say_bytes(drop.size.disk), again_text)
        if len(largest) > SHOWN:
            rest = total([drop.size for drop in largest[SHOWN:]])
            table.add_row(f"  and {len(largest) - SHOWN} more", say_bytes(rest.disk), "")
        console.print(table)
    for drop in done.restored if done is not None else []:
        path = drop.path.relative_to(store.root).as_posix()
        console.print(f"Put back, as a study was recorded meanwhile that wants it: {path}", soft_wrap=True)
    _list_skipped(console, {**decision.skipped, **(done.skipped if done is not None else {})})
    freed = say_bytes(total([drop.size for drop in drops]).disk)
    if not drops:
        hint = "" if options.orphans else " With --orphans also what no study names."
        console.print(f"Nothing to delete.{hint}", soft_wrap=True)
    elif done is not None:
        console.print(f"{freed} freed. No study has more to train than before.", soft_wrap=True)
    else:
        console.print(f"{freed} would be freed; no study would have more to train. Nothing was deleted.", soft_wrap=True)
        if decision.again:
            evals = sum(drop.stage.startswith("eval/") for drop in drops)
            more = f", and {_count(evals, 'evaluation')} to run" if evals else ""
            console.print(f"To make all of it again: {say_tokens(decision.again)} tokens to train{more}.", soft_wrap=True)
        console.print(f"To delete it: {_again(options)}", soft_wrap=True)


def asked(study: str, records: list[Record], alone: list[Row], own: Size) -> bool:
    """Ask whether to remove a study. Raises ConfigError where nobody can answer."""
    if not sys.stdin.isatty():
        raise ConfigError(f"Nobody is there to be asked whether {study} is to be removed. Say --yes.")
    revisions = [record for record in records if record.study == study]
    rows = len(next(record for record in revisions if record.current).listed["variants"])
    print(f"{study}: {_count(rows, 'variant')}, {_count(len(revisions), 'revision')}, its report. All of that is deleted.")
    print(f"{_count(len(alone), 'stage')} ({say_bytes(own.disk)}) would be of no study then, and stay until `zexp store gc --orphans`.")
    return input("Remove it? [y/N] ").strip().lower() in ("y", "yes")


def removed(study: str, alone: list[Row], own: Size) -> None:
    print(f"{study} was removed. {_count(len(alone), 'stage')} ({say_bytes(own.disk)}) are of no study now.")
    if alone:
        print("To see what of them can go: zexp store gc --orphans")


def exported(study: str, target: Path, states: str, count: int, size: int) -> None:
    weights = {"none": "no weights", "ends": "weights of the ends", "all": "all states, corpora and packings"}[states]
    print(f"{target}: {study}, {_count(count, 'file')}, {say_bytes(size)}, {weights}.")
    print(f"On another machine: zexp store import {target.name} && zexp report {study}")


def imported(store: Store, made: Imported) -> None:
    console = Console(highlight=False)
    console.print(
        f"{escape(made.study)}: {len(made.new)} new stages in {store.root}, {len(made.kept)} were here already, "
        f"{len(made.added)} places added to such.", soft_wrap=True,
    )  # fmt: skip
    if made.differs:
        console.print(f"[yellow]{len(made.differs)} have other files here than in the archive; those here stay:[/yellow]")
        for place in made.differs[:SHOWN]:
            console.print(f"  {place}", soft_wrap=True)
    console.print(f"To see it: zexp report {escape(made.study)}", soft_wrap=True)


def _named(row: Row) -> str:
    if row.studies:
        return escape(", ".join(row.studies))
    if row.earlier:
        return f"earlier revision of {escape(', '.join(row.earlier))}"
    return "below a study's" if row.below else "[yellow]none[/yellow]"


def _list_strays(console: Console, inventory: Inventory) -> None:
    for stray in inventory.strays:
        path = stray.path.relative_to(inventory.store.root).as_posix()
        console.print(f"[red]{path}[/red] is no stage ({say_bytes(stray.size.disk)}): zexp store verify", soft_wrap=True)


def _list_skipped(console: Console, skipped: dict[str, str]) -> None:
    by_reason: dict[str, list[str]] = {}
    for stage, why in skipped.items():
        by_reason.setdefault(why, []).append(stage)
    for why, stages in by_reason.items():
        some = ", ".join(stages[:3]) + (f" and {len(stages) - 3} more" if len(stages) > 3 else "")
        console.print(f"[dim]Left alone, {escape(why)}: {some}[/dim]", soft_wrap=True)


def _again(options: argparse.Namespace) -> str:
    words = ["zexp store gc", "--orphans" if options.orphans else ""]
    if options.keep_revisions is not None:
        words.append(f"--keep-revisions {options.keep_revisions}")
    if options.older_than:
        words.append(f"--older-than {options.older_than:g}")
    return " ".join([word for word in words if word] + ["--yes"])


def _sizes(counted: str | None) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for name in ([counted] if counted else []) + ["disk", "content"]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _size_row(table: Table, name: str, size: Size, count: str | None) -> None:
    cells = [] if count is None else [count]
    table.add_row(escape(name), *cells, say_bytes(size.disk), say_bytes(size.apparent))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _ago(seconds: float) -> str:
    """5 s, 12 min, 3 h, 40 d."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
