"""The verbs that compose nothing: status, report, logs, init. None of them imports torch."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from zexp.config.errors import ConfigError
from zexp.store import files
from zexp.store.folder import StageFolder, Store


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"zexp {verb}", description=description)
    parser.add_argument("--store", default=os.environ.get("ZEXP_STORE", "store"), help="folder of the results (default: store)")
    return parser


def _studies(store: Store) -> list[str]:
    folder = store.root / "studies"
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if (path / "variants.json").is_file())


def studies() -> list[str]:
    """The studies of the store that the environment or the working directory names."""
    return _studies(Store(Path(os.environ.get("ZEXP_STORE", "store"))))


def _study(store: Store, name: str) -> str:
    """The study of that name. Raises ConfigError listing those that there are."""
    known = _studies(store)
    if name in known:
        return name
    near = [study for study in known if study.startswith(name)]
    if len(near) == 1:
        return near[0]
    raise ConfigError(
        f"{name!r} is no study of the store {store.root}. "
        + (f"There are: {', '.join(near or known)}." if known else "It has none yet: zexp run +sweeps=quickstart")
    )


def status(arguments: list[str]) -> int:
    """Studies and how far they are."""
    parser = _parser("status", "Studies in the store and how far they are.")
    parser.add_argument("study", nargs="?", help="one study, stage by stage")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(arguments)
    from rich.console import Console
    from rich.table import Table

    from zexp.report.status import folder_of, read_stages

    store = Store(Path(options.store))
    names = [_study(store, options.study)] if options.study else _studies(store)
    answer = {}
    for name in names:
        planned = files.read_json(store.study(name) / "variants.json")["stages"]
        answer[name] = [
            {"id": s.id, "kind": s.kind, "label": s.label, "folder": s.folder, "status": s.status, "reason": s.reason}
            | ({"status": "running"} if s.status != "done" and folder_of(store, s).holder() else {})
            for s in read_stages(store, planned).values()
        ]
    if options.json:
        print(json.dumps({"store": str(store.root), "studies": answer}))
        return 0
    console = Console(highlight=False)
    if not names:
        console.print(f"No studies in {store.root}. To begin: zexp run +sweeps=quickstart")
        return 0
    table = Table(box=None, pad_edge=False)
    if options.study:
        for column in ("stage", "kind", "what", "status", ""):
            table.add_column(column, overflow="fold")
        for stage in answer[names[0]]:
            table.add_row(*(stage[key] for key in ("id", "kind", "label", "status", "reason")))
    else:
        for column in ("study", "stages", "done", "running", "failed", "diverged"):
            table.add_column(column, justify="left" if column == "study" else "right", overflow="fold")
        for name in names:
            found = [stage["status"] for stage in answer[name]]
            counts = (str(found.count(word)) for word in ("done", "running", "failed", "diverged"))
            table.add_row(name, str(len(found)), *counts)
    console.print(table)
    return 0


def report(arguments: list[str]) -> int:
    """Tables and the leaderboard of a study, also of half a one."""
    parser = _parser("report", "Tables and one HTML leaderboard, also of half a study.")
    parser.add_argument("study")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(arguments)
    from rich.console import Console

    from zexp import report as reports

    store = Store(Path(options.store))
    made = reports.build(store.root, _study(store, options.study))
    paths = reports.write(made)
    if options.json:
        print(json.dumps(made.to_json()))
        return 0
    console = Console(highlight=False)
    reports.print_tables(made, console)
    console.print(f"Leaderboard: {paths['html']}", soft_wrap=True)
    return 0


def logs(arguments: list[str]) -> int:
    """The log of a stage's last attempt."""
    parser = _parser("logs", "The log of a stage's last attempt.")
    parser.add_argument("stage", help="a stage's id or the beginning of one, STUDY/VARIANT, or a folder of the store")
    options = parser.parse_args(arguments)
    store = Store(Path(options.store))
    folder = _stage(store, options.stage)
    last = folder.last_attempt()
    if last is None or not last.log.is_file():
        raise ConfigError(f"{folder} has no log: it was never started.")
    print(last.log, file=sys.stderr)
    sys.stdout.write(last.log.read_text(encoding="utf-8", errors="replace"))
    return 0


def _stage(store: Store, said: str) -> StageFolder:
    """The stage that a user names. Raises ConfigError with the candidates if there is not exactly one."""
    study, slash, variant = said.partition("/")
    if slash and study in _studies(store):
        record = files.read_json(store.study(study) / "variants.json")
        rows = [row for row in [*record["variants"], *record["pretrained"]] if variant in (row["name"], row["row"])]
        if len(rows) != 1:
            names = [row["name"] for row in rows or [*record["variants"], *record["pretrained"]]]
            which = "It could be" if rows else "There are"
            raise ConfigError(f"{variant!r} names {len(rows)} variants of {study}. {which}: {', '.join(names)}.")
        said = rows[0]["segments"][-1]
    if Path(said).is_dir():
        said = Path(said).resolve().name
    found = store.find(said.partition("@")[0])
    if len(found) != 1:
        if not found:
            raise ConfigError(f"{said!r} names no stage of {store.root}. `zexp status STUDY` lists the stages with their ids.")
        candidates = ", ".join(str(folder) for folder in found[:8])
        raise ConfigError(f"{said!r} names {len(found)} stages: {candidates}. Give more digits.")
    return found[0]


def init(arguments: list[str]) -> int:
    """A small folder of one's own."""
    parser = argparse.ArgumentParser(
        prog="zexp init",
        description="A small folder of your own: texts, an architecture, a mix over the texts, a study. It runs as it is.",
    )
    parser.add_argument("folder", help="made if it is not there; nothing in it is overwritten")
    options = parser.parse_args(arguments)
    from zexp.starter import write

    folder = Path(options.folder)
    for path in write(folder):
        print(path)
    print(f"\nTo train it: cd {folder} && zexp run +sweeps=mine")
    return 0
