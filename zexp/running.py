"""The verbs for what runs: how far it is, what it prints, and to stop it. None imports torch."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from zexp.arguments import verb_parser
from zexp.config.errors import ConfigError
from zexp.report.status import folder_of, read_stages
from zexp.store import files
from zexp.store.attempt import AttemptRecord
from zexp.store.folder import StageFolder, Store
from zexp.store.process import known_dead, this_process
from zexp.study import names
from zexp.study.launch import driver
from zexp.study.launch.slurm import cluster, submission
from zexp.study.launch.slurm.follow import job_log
from zexp.study.launch.slurm.lookup import StageJob, jobs_of, live_jobs

WATCH_SECONDS = 5.0
FOLLOW_SECONDS = 0.5
STYLES = {"done": "green", "running": "cyan", "failed": "red", "diverged": "red"}


# Status


def status(arguments: list[str]) -> int:
    """Studies and how far they are."""
    parser = verb_parser("status", "Studies in the store and how far they are.")
    parser.add_argument("study", nargs="?", help="one study, stage by stage")
    parser.add_argument("--watch", action="store_true", help=f"look again every {WATCH_SECONDS:g} s, until nothing runs or waits")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(arguments)
    store = Store(Path(options.store))
    shown = [names.study(store, options.study)] if options.study else None
    if options.json:
        if options.watch:
            raise ConfigError("--watch and --json: one JSON object is printed once. Leave one of them out.")
        print(json.dumps({"store": str(store.root), "studies": _look(store, shown)[0]}))
        return 0
    console = Console(highlight=False)
    if not names.studies(store):
        console.print(f"No studies in {store.root}. To begin: zexp run +sweeps=quickstart")
        return 0
    if not options.watch:
        console.print(_picture(*_look(store, shown), shown))
        return 0
    with Live(console=console, auto_refresh=False) as live:
        while True:
            found, silent = _look(store, shown)
            live.update(_picture(found, silent, shown), refresh=True)
            driven = any(driver.running(store, name) for name in found)
            if not (silent or driven or any(_goes_on(stage) for stages in found.values() for stage in stages)):
                return 0
            time.sleep(WATCH_SECONDS)


def _look(store: Store, shown: list[str] | None) -> tuple[dict[str, list[dict[str, Any]]], bool]:
    """(study -> its stages, whether the scheduler was asked in vain)."""
    studies = names.studies(store) if shown is None else shown
    jobs, silent = jobs_of(store, studies)
    found = {}
    for name in studies:
        planned = files.read_json(store.study(name) / "variants.json")["stages"]
        stages = read_stages(store, planned)
        found[name] = [_stage(folder_of(store, s), s, jobs.get(name, {}).get(s.id)) for s in stages.values()]
    return found, silent


def _stage(folder: StageFolder, stage: Any, job: StageJob | None) -> dict[str, Any]:
    """One stage as status shows it. waiting: in a queue; running: somebody alive holds its lease."""
    about = {"id": stage.id, "kind": stage.kind, "label": stage.label, "folder": stage.folder, "status": stage.status}
    about |= {"reason": stage.reason, "job": None if job is None else job.to_json(), "progress": None}
    if stage.status == "done":
        return about
    last = folder.last_attempt()
    if stage.status not in ("failed", "diverged") and folder.holder() is not None:
        about |= {"status": "running", "progress": None if last is None else last.progress()}
    elif job is not None and job.waits and stage.status in ("missing", "failed"):
        about |= {"status": "waiting"}
    elif job is not None and job.ended in ("failed", "skipped") and stage.status == "missing":
        about |= {"status": job.ended, "reason": job.why}
    elif job is not None and job.said is not None and stage.status == "missing":
        about |= {"reason": ": ".join(filter(None, (stage.reason, job.line())))}
    return about


def _goes_on(stage: Mapping[str, Any]) -> bool:
    return stage["status"] in ("running", "waiting")


def _picture(found: Mapping[str, list[dict[str, Any]]], silent: bool, shown: list[str] | None) -> Group:
    table = Table(box=None, pad_edge=False)
    if shown is not None:
        for column in ("stage", "kind", "what", "status", ""):
            table.add_column(column, overflow="fold")
        for stage in found[shown[0]]:
            style = STYLES.get(stage["status"])
            said = f"[{style}]{stage['status']}[/]" if style else stage["status"]
            table.add_row(*map(escape, (stage["id"], stage["kind"], stage["label"])), said, escape(_note(stage)))
    else:
        words = ("done", "running", "waiting", "failed", "diverged", "skipped")
        for column in ("study", "stages", *words):
            table.add_column(column, justify="left" if column == "study" else "right", overflow="fold")
        for name, stages in found.items():
            counts = Counter(stage["status"] for stage in stages)
            table.add_row(escape(name), str(len(stages)), *(str(counts[word]) for word in words))
    lines: list[Any] = [table]
    if silent:
        lines.append(Text("SLURM's controller does not answer: what waits in its queue is not shown."))
    return Group(*lines)


def _note(stage: Mapping[str, Any]) -> str:
    """How far it is, which job it is, why it is not done."""
    parts = []
    progress, job = stage["progress"], stage["job"]
    if progress:
        parts.append(f"{progress['done']:,} of {progress['total']:,} {progress['unit']}")
        if progress.get("loss") is not None:
            parts.append(f"loss {progress['loss']:.3f}")
    elif stage["status"] not in ("done", "running"):
        parts.append(stage["reason"] if stage["status"] != "waiting" else "")
    if job is not None and _goes_on(stage):
        why = f" ({job['reason']})" if job.get("reason") and job.get("state") == "PENDING" else ""
        where = f" on {job['node']}" if job.get("node") else ""
        parts.append(f"job {job['id']} {job.get('state', '')}{where}{why}")
    return ", ".join(filter(None, parts))


# Logs


def logs(arguments: list[str]) -> int:
    """The log of a stage's last attempt."""
    parser = verb_parser("logs", "The log of a stage's last attempt.")
    parser.add_argument("stage", help="a stage's id or the beginning of one, STUDY/VARIANT, or a folder of the store")
    parser.add_argument("-f", "--follow", action="store_true", help="go on printing until nobody works at the stage")
    options = parser.parse_args(arguments)
    store = Store(Path(options.store))
    folder = names.stage(store, options.stage)
    last = folder.last_attempt()
    while last is None and options.follow and _waits(store, folder):
        time.sleep(WATCH_SECONDS)
        last = folder.last_attempt()
    if last is None or not (last.log.is_file() or options.follow):
        printed = _printed_by_job(store, folder)
        if printed is None:
            raise ConfigError(f"{folder} has no log: it was never started.")
        print(printed, file=sys.stderr)
        sys.stdout.write(printed.read_text(encoding="utf-8", errors="replace"))
        return 0
    if not options.follow:
        print(last.log, file=sys.stderr)
        sys.stdout.write(last.log.read_text(encoding="utf-8", errors="replace"))
        return 0
    return _follow(store, folder, last)


def _jobs(store: Store, folder: StageFolder) -> list[StageJob]:
    """The newest jobs of the stages of a folder, of every study."""
    found, _ = jobs_of(store, names.studies(store))
    return [job for jobs in found.values() for stage, job in jobs.items() if stage.partition("@")[0] == folder.path.name]


def _waits(store: Store, folder: StageFolder) -> bool:
    """A job of the stage is in a queue."""
    return any(job.waits for job in _jobs(store, folder))


def _printed_by_job(store: Store, folder: StageFolder) -> Path | None:
    """What the last job of a stage printed that never came to begin it."""
    logs = [log for job in _jobs(store, folder) if (log := job_log(job.submission, job.id)) is not None]
    return logs[-1] if logs else None


def _follow(store: Store, folder: StageFolder, attempt: AttemptRecord) -> int:
    """Print the log as it grows; go on with the next attempt's when there is one, or a job of the stage will make one."""
    print(attempt.log, file=sys.stderr)
    place = 0
    while True:
        alive = folder.holder() is not None
        place = _print_from(attempt, place)
        newest = folder.last_attempt()
        assert newest is not None
        if newest.n != attempt.n:
            attempt, place = newest, 0
            print(attempt.log, file=sys.stderr)
            continue
        if not alive and not _waits(store, folder):
            return 0
        time.sleep(FOLLOW_SECONDS if alive else WATCH_SECONDS)


def _print_from(attempt: AttemptRecord, place: int) -> int:
    """Print what the log has from `place` (bytes) on; where it ends."""
    if not attempt.log.is_file():
        return place
    with attempt.log.open("rb") as stream:
        stream.seek(place)
        got = stream.read()
    sys.stdout.write(got.decode("utf-8", errors="replace"))
    sys.stdout.flush()
    return place + len(got)


# Cancel


def cancel(arguments: list[str]) -> int:
    """Stop a study, or one stage: running trainings write a state first."""
    parser = verb_parser("cancel", "Stop a study's jobs and processes, or those of one stage. Running trainings write a state first.")
    parser.add_argument("what", metavar="STUDY|STAGE", help="a study's name, a stage's id or the beginning of one, or STUDY/VARIANT")
    options = parser.parse_args(arguments)
    store = Store(Path(options.store))
    if options.what in names.studies(store):
        return _cancel_study(store, options.what)
    return _cancel_stage(store, names.stage(store, options.what))


def _cancel_study(store: Store, study: str) -> int:
    lines = [_scancel(store, study, None)]
    found = driver.running(store, study)
    if driver.stop(store, study):
        lines.append(f"{study} was told to stop: its running stages write a state first.")
    elif found is not None:
        lines.append(f"{study} is driven by process {found['pid']} on {found['host']}, which goes on. Cancel it there.")
    print("\n".join(filter(None, lines)) or f"Nothing of {study} runs or waits.")
    return 1 if found is not None and not driver.is_here(found) else 0


def _cancel_stage(store: Store, folder: StageFolder) -> int:
    """End what works at one stage now: its jobs, else its process on this machine."""
    lines = []
    for study in names.studies(store):
        lines.append(_scancel(store, study, folder.path.name))
    holder = folder.holder()
    if not any(lines) and holder is not None:
        lines.append(_terminate(folder, holder))
    print("\n".join(filter(None, lines)) or f"Nobody works at {folder}, and no job for it waits.")
    return 0


def _scancel(store: Store, study: str, stage: str | None) -> str | None:
    """Cancel the live jobs of a study, or those of them that run one stage (the name of its folder); what was done."""
    sent = [one for one in submission.of_study(store, study) if not one.over]
    if not sent:
        return None
    queued = cluster.queue({one.name for one in sent})
    if queued is None:
        raise ConfigError("SLURM's controller does not answer. Nothing was cancelled; try again.")
    away = sorted({there for one in sent if (there := one.elsewhere()) is not None})
    if away:
        raise ConfigError(f"{study} has jobs on the cluster {', '.join(away)}. Cancel it from there. Nothing was cancelled.")
    live = {id: ids for one in sent for id, ids in live_jobs(one, queued).items()}
    if stage is not None:
        live = {id: ids for id, ids in live.items() if any(one.partition("@")[0] == stage for one in ids)}
    if not live:
        return None
    cluster.cancel(list(live))
    text = f"Cancelled {len(live)} job{'s' * (len(live) != 1)} of {study} ({', '.join(list(live)[:8])}{' …' * (len(live) > 8)})."
    others = sorted({one for ids in live.values() for one in ids if stage is not None and one.partition("@")[0] != stage})
    if others:
        text += f" The same jobs were to run {len(others)} other stage{'s' * (len(others) != 1)}: {', '.join(others[:8])}."
    return text


def _terminate(folder: StageFolder, holder: Mapping[str, Any]) -> str:
    """TERM to the process that holds a stage's lease, if it runs here."""
    here = this_process()
    if any(holder.get(key) != here[key] for key in ("host", "boot", "namespace")):
        raise ConfigError(
            f"{folder} is in the hands of process {holder.get('pid')} on {holder.get('host')}, which is not this machine. Stop it there."
        )
    if known_dead(dict(holder)):
        return f"The process that worked at {folder} is gone."
    os.kill(int(holder["pid"]), signal.SIGTERM)
    return f"Process {holder['pid']}, which works at {folder}, was told to stop at its next state."
