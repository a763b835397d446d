"""`zexp store ls|du|verify|gc|rm|export|import`: the arguments, and what happens in which order. No torch.

What is shown stands in show_store.py; what it means in zexp.store and zexp.study.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zexp.arguments import add_store
from zexp.config.errors import ConfigError
from zexp.store.folder import KINDS, Store, named_store

if TYPE_CHECKING:
    from zexp.store.inventory import Inventory
    from zexp.store.verification import Damage
    from zexp.study.recorded import Record

PARTS = ("ls", "du", "verify", "gc", "rm", "export", "import")
_WITH_STUDY = ("ls", "du", "verify", "rm", "export")


def store(arguments: list[str]) -> int:
    """Run one part of the verb; the exit code."""
    options = _parser().parse_args(arguments)
    part: Callable[[Store, argparse.Namespace], int] = options.act
    return part(Store(Path(options.store), patience=0.0), options)


def completed(words: list[str]) -> list[str]:
    """What the last of the words behind `zexp store` may become."""
    *before, begun = words
    if not before:
        offered: list[str] = list(PARTS)
    elif before[-1] == "--kind":
        offered = list(KINDS)
    elif before[-1] == "--states":
        offered = ["none", "ends", "all"]
    elif begun.startswith("-"):
        offered = [option for option in _options(before[0]) if option not in before]
    elif before[0] in _WITH_STUDY and before[-1] not in _with_value(before[0]) and not _places(before):
        from zexp.study import names

        offered = names.studies(Store(Path(named_store())))
    else:
        offered = []
    return [one for one in offered if one.startswith(begun)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zexp store", description="What the store holds: to see, check, thin out, and carry elsewhere.")
    parts = parser.add_subparsers(required=True, metavar="|".join(PARTS))
    for name, (act, text) in _PARTS.items():
        part = parts.add_parser(name, help=text, description=text)
        part.set_defaults(act=act)
        for flags, settings in _ARGUMENTS[name]:
            part.add_argument(*flags, **settings)
        part.add_argument("--json", action="store_true", help="one JSON object on stdout")
        add_store(part)
    return parser


def _options(part: str) -> list[str]:
    return [flag for flags, _ in _ARGUMENTS.get(part, []) for flag in flags if flag.startswith("--")] + ["--json", "--store"]


def _with_value(part: str) -> set[str]:
    found = {flag for flags, settings in _ARGUMENTS.get(part, []) for flag in flags if settings.get("action") != "store_true"}
    return {flag for flag in found if flag.startswith("-")} | {"--store"}


def _places(words: list[str]) -> list[str]:
    """Of a part and its words those that are neither options nor their values."""
    valued = _with_value(words[0])
    return [word for one, word in pairwise(words) if not word.startswith("-") and one not in valued]


def _ls(store: Store, options: argparse.Namespace) -> int:
    from zexp import show_store
    from zexp.study import holdings

    study = _study(store, options.study)
    inventory = _look(store, options.json)
    rows = holdings.rows(inventory, _records(store), study, options.kind)
    if options.json:
        return _print_json({"store": str(store.root), "stages": [row.to_json() for row in rows]})
    show_store.ls(inventory, rows, study)
    return 0


def _du(store: Store, options: argparse.Namespace) -> int:
    from zexp import show_store
    from zexp.study import holdings

    study = _study(store, options.study)
    usage = holdings.usage(_look(store, options.json), _records(store), study)
    if options.json:
        return _print_json({"store": str(store.root), **usage.to_json()})
    show_store.du(store, usage, study)
    return 0


def _verify(store: Store, options: argparse.Namespace) -> int:
    from zexp import show_store
    from zexp.store import trash, verification

    inventory = _look(store, options.json)
    keys, damages = _to_verify(store, inventory, options.what)
    whole = verification.size_of(inventory, keys)
    with _progress("verifying", 0 if options.quick else whole, options.json) as on_bytes:
        damages += verification.check(inventory, keys, contents=not options.quick, on_bytes=on_bytes)
    moved, not_moved = [], {}
    for damage in damages if options.set_aside else []:
        if damage.movable:
            try:
                if verification.set_aside(inventory.stages[damage.stage].folder, damage.place):
                    moved.append(damage)
            except trash.Busy as busy:
                not_moved[f"{damage.stage}/{damage.place}"] = str(busy)
    published = sum(len(verification.published(inventory.stages[key])) for key in keys)
    if options.json:
        _print_json(
            {
                "store": str(store.root), "stages": len(keys), "published": published, "bytes": whole, "quick": options.quick,
                "damaged": [damage.to_json() for damage in damages],
                "set_aside": [damage.to_json() for damage in moved], "not_set_aside": not_moved,
            }
        )  # fmt: skip
    else:
        show_store.verified(len(keys), published, whole, options.quick, damages, moved, not_moved)
    return 1 if damages else 0


def _to_verify(store: Store, inventory: Inventory, what: str | None) -> tuple[list[str], list[Damage]]:
    """The stages that were asked for, and what is damaged beside stages: records of studies, folders that are none."""
    from zexp.store import verification
    from zexp.store.errors import StoreError
    from zexp.study import names, recorded

    records, damages = [], []
    for name in recorded.names(store):
        folder = store.study(name)
        for path in [folder, *sorted((folder / "revisions").glob("*"))]:
            try:
                records.append(recorded.read(path, name, current=path == folder))
            except StoreError as error:
                place = path.relative_to(store.root).as_posix()
                problem = str(error).replace(f"{path / recorded.VARIANTS}", "it")
                damages.append(verification.Damage(place, recorded.VARIANTS, problem, "until then gc, ls and du refuse to work"))
    if what is None:
        return list(inventory.stages), [*damages, *verification.strays(inventory)]
    known = names.studies(store)
    if what in known or ("/" not in what and any(name.startswith(what) for name in known)):
        name = names.study(store, what)
        mine = [damage for damage in damages if damage.stage.split("/")[1] == name]
        named = {key for record in records if record.study == name for key in record.folders}
        lost = [damage for damage in verification.strays(inventory) if damage.stage in named]
        return sorted(inventory.closure(named)), [*mine, *lost]
    return [str(names.stage(store, what))], []


def _gc(store: Store, options: argparse.Namespace) -> int:
    from zexp import show_store
    from zexp.study import gc, recorded

    problems = []
    if options.keep_revisions is not None and options.keep_revisions < 0:
        problems.append(f"--keep-revisions {options.keep_revisions}: 0 or more earlier revisions.")
    if not 0 <= options.older_than < float("inf"):
        problems.append(f"--older-than {options.older_than}: a number of days, 0 or more.")
    if problems:
        raise ConfigError(problems)
    chosen = gc.Options(
        orphans=options.orphans, revisions=options.keep_revisions, older=options.older_than * gc.DAY
    )
    # Before the look: what is recorded after this is seen as new when something is about to go.
    stamp = recorded.stamp(store)
    inventory = _look(store, options.json)
    begun = [stray for stray in inventory.strays if any(stray.path.glob("states/*")) or (stray.path / "result").exists()]
    if begun and chosen.orphans:
        raise ConfigError(
            f"{begun[0].path}: {begun[0].problem} What it is made from is not known, so nothing can be called an orphan.\n"
            "  `zexp store verify` lists what is damaged and what to do; without --orphans gc works."
        )
    decision = gc.decide(inventory, recorded.records(store, chosen.revisions), chosen, time.time())
    done = None
    if options.yes and decision.drops:
        with _progress("deleting", sum(drop.size.disk for drop in decision.drops), options.json) as on_bytes:
            done = gc.carry_out(inventory, decision, chosen, stamp, lambda drop: on_bytes(drop.size.disk))
    if options.json:
        dropped = decision.drops if done is None else done.dropped
        return _print_json(
            {
                "store": str(store.root), "dry_run": not options.yes,
                "drops": [drop.to_json(store.root) for drop in dropped],
                "bytes": sum(drop.size.disk for drop in dropped),
                "tokens_to_train_again": decision.again,
                "skipped": {**decision.skipped, **(done.skipped if done is not None else {})},
                "restored": [drop.to_json(store.root) for drop in done.restored] if done is not None else [],
            }
        )  # fmt: skip
    show_store.collected(store, decision, done, options)
    return 0


def _rm(store: Store, options: argparse.Namespace) -> int:
    from zexp import show_store
    from zexp.store import trash
    from zexp.study import holdings, names
    from zexp.study.launch import driver
    from zexp.study.launch.slurm.lookup import jobs_of

    if options.json and not options.yes:
        raise ConfigError("--json asks no question. Say --yes as well.")
    if options.study not in names.studies(store):
        near = names.study(store, options.study)  # raises, listing those that there are
        raise ConfigError(f"{options.study!r} is no study; do you mean {near!r}? What is removed has to be named in full.")
    study = options.study
    inventory, records = _look(store, options.json), _records(store)
    alone = [row for row in holdings.rows(inventory, records, study) if set(row.studies + row.earlier) == {study}]
    working = [row for row in alone if row.seen is not None and row.seen.holder is not None]
    if working:
        who = trash.said(working[0].seen.holder)  # type: ignore[union-attr, arg-type]
        raise ConfigError(f"{study} is running: {who} ({working[0].key}: {working[0].label}). Stop it first.")
    if (found := driver.running(store, study)) is not None:
        raise ConfigError(f"{study} is driven by process {found['pid']} on {found['host']}. `zexp cancel {study}` stops it; then remove it.")
    jobs, silent = jobs_of(store, [study])
    waiting = [job.id for job in jobs[study].values() if job.said is not None and not job.said.over]
    if waiting or silent:
        which = f"has jobs in the queue ({', '.join(sorted(set(waiting))[:8])})" if waiting else "may have jobs: SLURM does not answer"
        raise ConfigError(f"{study} {which}. `zexp cancel {study}` ends them; then remove it.")
    own = holdings.usage(inventory, records, study).studies[study][1]
    if not options.yes and not show_store.asked(study, records, alone, own):
        print("Nothing was removed.")
        return 2
    trash.delete(trash.away(store, store.study(study), f"study-{study}").now)
    if options.json:
        return _print_json({"removed": study, "stages_of_no_study": len(alone), "bytes": own.to_json()})
    show_store.removed(study, alone, own)
    return 0


def _export(store: Store, options: argparse.Namespace) -> int:
    from zexp import show_store
    from zexp.study import names, share

    study = names.study(store, options.study)
    target = Path(options.output or share.archive_name(study)).expanduser()
    inventory = _look(store, options.json)
    whole = sum(share.size_of(path) for _, path in share.choose(inventory, study, options.states))
    with _progress("exporting", whole, options.json) as on_bytes:
        count, size = share.export(inventory, study, target, options.states, on_bytes)
    if options.json:
        return _print_json({"study": study, "archive": str(target), "states": options.states, "files": count, "bytes": size})
    show_store.exported(study, target, options.states, count, size)
    return 0


def _import(store: Store, options: argparse.Namespace) -> int:
    from zexp import show_store
    from zexp.store import archive
    from zexp.study import share

    path = Path(options.file).expanduser()
    whole = archive.read_about(path).get("bytes", 0)
    with _progress("importing", whole if isinstance(whole, int) else 0, options.json) as on_bytes:
        made = share.import_(store, path, options.as_, on_bytes)
    if options.json:
        return _print_json({"store": str(store.root), **made.to_json()})
    show_store.imported(store, made)
    return 0


def _study(store: Store, said: str | None) -> str | None:
    from zexp.study import names

    return None if said is None else names.study(store, said)


def _records(store: Store) -> list[Record]:
    from zexp.study import recorded

    return recorded.records(store)


def _look(store: Store, quiet: bool) -> Inventory:
    from zexp.store import inventory

    if quiet or not sys.stderr.isatty():
        return inventory.look(store)
    from rich.console import Console

    with Console(stderr=True).status("looking at the store …") as status:
        return inventory.look(store, lambda count: status.update(f"looking at the store: {count} stages …"))


@contextmanager
def _progress(what: str, whole: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr over so many bytes, for a person who watches; nothing in a pipe."""
    if quiet or whole == 0 or not sys.stderr.isatty():
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=whole)
        yield lambda size: bar.advance(task, size)


def _print_json(value: dict[str, Any]) -> int:
    print(json.dumps(value))
    return 0


_PARTS: dict[str, tuple[Callable[[Store, argparse.Namespace], int], str]] = {
    "ls": (_ls, "The stages in the store: what they are, what they hold, who names them."),
    "du": (_du, "What takes the room: by kind, by study, and what could be freed."),
    "verify": (_verify, "Compare what was published with its checksums. Changes nothing; exit 1 if something is damaged."),
    "gc": (_gc, "What no study needs, and what it costs to make it again. Deletes nothing without --yes."),
    "rm": (_rm, "Remove a study's record and report. Its stages stay, until `gc --orphans`."),
    "export": (_export, "A study as one file that another machine's `zexp report` can read."),
    "import": (_import, "Unpack an archive that `export` wrote. What is here already stays as it is."),
}

_STUDY: dict[str, Any] = {"nargs": "?", "metavar": "STUDY", "help": "one study (default: the whole store)"}
_ARGUMENTS: dict[str, list[tuple[tuple[str, ...], dict[str, Any]]]] = {
    "ls": [
        (("study",), _STUDY),
        (("--kind",), {"choices": KINDS, "metavar": "KIND", "help": f"only {', '.join(KINDS)}"}),
    ],
    "du": [(("study",), _STUDY)],
    "verify": [
        (("what",), {"nargs": "?", "metavar": "STUDY|STAGE", "help": "one study or stage (default: the whole store)"}),
        (("--quick",), {"action": "store_true", "help": "names and sizes only, no checksums"}),
        (("--set-aside",), {"action": "store_true", "help": "move what is damaged away, so that the next run makes it again"}),
    ],
    "gc": [
        (("--orphans",), {"action": "store_true", "help": "also stages and states that no study names"}),
        (
            ("--keep-revisions",),
            {"type": int, "metavar": "N", "help": "earlier revisions of a study that count as naming (default: all)"},
        ),
        (
            ("--older-than",),
            {"type": float, "default": 0.0, "metavar": "DAYS", "help": "only stages and states that were not used for so long"},
        ),
        (("--yes",), {"action": "store_true", "help": "delete it"}),
    ],
    "rm": [
        (("study",), {"metavar": "STUDY", "help": "its name in full"}),
        (("--yes",), {"action": "store_true", "help": "without a question"}),
    ],
    "export": [
        (("study",), {"metavar": "STUDY"}),
        (("-o", "--output"), {"metavar": "FILE", "help": "FILE.tar.gz or FILE.tar (default: STUDY.tar.gz)"}),
        (
            ("--states",),
            {
                "choices": ("none", "ends", "all"), "default": "none",
                "help": "weights: none (default); ends: of the states that were scored; all: every state, with corpora and "
                "packings, to go on training there",
            },
        ),
    ],
    "import": [
        (("file",), {"metavar": "FILE"}),
        (("--as",), {"dest": "as_", "metavar": "NAME", "help": "call the study so here"}),
    ],
}  # fmt: skip
