"""Reads a study's variants.json and the store into a Report. Works at any time: on half a study, or while it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zexp.config.errors import ConfigError
from zexp.report.curves import Curve, read_curve
from zexp.report.fingerprints import Fingerprints
from zexp.report.model import Report, Row, Stage, Unfinished
from zexp.report.scores import Scored, cell_of, read_items, read_results
from zexp.report.statistics import Score
from zexp.report.status import folder_of, read_stages, stopped_at, worst
from zexp.report.tree import Mark, Trajectory
from zexp.report.verdicts import compare, fingerprint_warnings
from zexp.store import files
from zexp.store.folder import Store


def build(store_root: Path, study: str) -> Report:
    """The report of a study. Raises ConfigError if the store has no study of that name."""
    store = Store(store_root)
    path = store.study(study) / "variants.json"
    if not path.is_file():
        raise ConfigError(_no_study(store, study))
    listed = files.read_json(path)
    stages = read_stages(store, listed["stages"])
    reader = _Reader(store, stages)
    warnings: list[str] = []
    entries = [(entry, True) for entry in listed["pretrained"]] + [(entry, False) for entry in listed["variants"]]
    groups: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for entry, pretrained in entries:
        groups.setdefault((pretrained, entry["row"]), []).append(entry)
    rows = [reader.row(name, members, pretrained, warnings) for (pretrained, name), members in groups.items()]
    about = listed["study"]
    difference = reader.fingerprints.difference
    pairs, problems = compare(rows, about.get("baseline") or {}, reader.items, difference)
    warnings += problems + fingerprint_warnings(rows, pairs, difference)
    warnings += _shared_pretrainings(groups)
    unfinished = [one for entry, _ in entries for one in reader.unfinished(entry)]
    trajectories = reader.trajectories(entries)
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    metric = about.get("metric")
    if metric is not None and metric not in names and any(row.metrics for row in rows):
        warnings.append(f"study.metric = {metric} was scored for no variant; there are: {', '.join(names)}.")
    return Report(
        study=about.get("name", study),
        question=about.get("question"),
        metric=metric,
        baseline=dict(about.get("baseline") or {}),
        revision=about.get("revision"),
        store=str(store.root),
        rows=sorted(rows, key=lambda row: row.pretrained),  # variants first, pretrained states after them
        pairs=sorted(pairs, key=lambda pair: pair.metric != metric),
        unfinished=unfinished,
        warnings=list(dict.fromkeys(warnings)),
        stages=list(stages.values()),
        trajectories=trajectories,
        curves=[reader.curve(trajectory) for trajectory in trajectories],
        metric_names=sorted(names, key=lambda name: name != metric),  # the study's metric first
    )


class _Reader:
    """Reads evaluations once each: many rows and comparisons ask for the same."""

    def __init__(self, store: Store, stages: Mapping[str, Stage]) -> None:
        self.store, self.stages = store, stages
        self.fingerprints = Fingerprints()
        self._items: dict[str, dict[str, dict[str, Score]]] = {}

    def row(self, name: str, members: Sequence[Mapping[str, Any]], pretrained: bool, warnings: list[str]) -> Row:
        first = members[0]
        by_seed = {str(member["seed"]): self._status(member) for member in members}
        notes: list[str] = []
        scored: dict[str, dict[str, Scored]] = {}
        distinct: dict[tuple[str, ...], str] = {}
        for member in members:
            seed, chain = str(member["seed"]), tuple(member["segments"])
            if chain in distinct:
                notes.append(f"seed {seed} is the same run as seed {distinct[chain]}: nothing in it reads the seed")
                continue
            distinct[chain] = seed
            for metric, score in self._scores(member, warnings).items():
                scored.setdefault(metric, {})[seed] = score
        if len(distinct) < len(members):
            warnings.append(f"{name}: {len(members)} seeds are {len(distinct)} run(s), counted as n = {len(distinct)}.")
        if (lost := [seed for seed, status in by_seed.items() if status in ("diverged", "failed")]) and scored:
            warnings.append(f"{name} is a mean over the seeds that finished; seed {', '.join(lost)} did not.")
        fingerprints = sorted(
            {fp for member in members for fp in self.fingerprints.of_chain(self.store, self._chain(member))}
        )
        return Row(
            name=name,
            axes={axis: value for axis, value in first.get("axes", {}).items() if axis != "seed"},
            arch=first["arch"],
            anneal=first["anneal"],
            pretrained=pretrained,
            status=worst(list(by_seed.values())),
            parameters=dict(first["parameters"]),
            tokens=first["tokens"],
            train_flops=first["train_flops"],
            seeds=[member["seed"] for member in members],
            by_seed=by_seed,
            metrics={metric: cell_of(seeds) for metric, seeds in scored.items()},
            segments={str(member["seed"]): list(member["segments"]) for member in members},
            evals={str(member["seed"]): dict(member["evals"]) for member in members},
            fingerprints=fingerprints,
            notes=notes,
        )

    def items(self, stage_id: str, metric: str) -> Mapping[str, Score]:
        if stage_id not in self._items:
            result = folder_of(self.store, self.stages[stage_id]).result
            self._items[stage_id] = read_items(result) if result is not None else {}
        return self._items[stage_id].get(metric, {})

    def unfinished(self, entry: Mapping[str, Any]) -> list[Unfinished]:
        """The stages that a variant waits for: where its training stopped, else every evaluation not done."""
        stop = self._stop(entry)
        evals = [self.stages[stage] for stage in entry["evals"].values()]
        waiting = [stop] if stop is not None else [stage for stage in evals if stage.status != "done"]
        return [
            Unfinished(
                variant=entry["name"],
                row=entry["row"],
                status=self._status_at(entry, stage),
                stage=stage.id,
                reason=f"{stage.label}: {stage.reason}" if stage.label else stage.reason,
                folder=stage.folder,
                log=stage.log,
                traceback=stage.traceback,
            )
            for stage in waiting
        ]

    def trajectories(self, entries: Sequence[tuple[Mapping[str, Any], bool]]) -> list[Trajectory]:
        """One a folder of segments, parents first, with the rows that train through it."""
        cuts: dict[str, list[Stage]] = {}
        for stage in self.stages.values():
            if stage.kind == "segment":
                cuts.setdefault(stage.folder, []).append(stage)
        rows: dict[str, list[str]] = {folder: [] for folder in cuts}
        users: dict[str, list[str]] = {folder: [] for folder in cuts}
        evals: dict[str, list[str]] = {}
        for entry, pretrained in sorted(entries, key=lambda pair: pair[1]):
            for folder in dict.fromkeys(self.stages[stage].folder for stage in entry["segments"]):
                rows[folder].append(entry["row"])
                if not (pretrained and users[folder]):
                    users[folder].append(entry["name"])
            evals.setdefault(entry["segments"][-1], []).extend(entry["evals"].values())
        trajectories = []
        for folder, stages in cuts.items():
            stages.sort(key=lambda stage: stage.to or 0)
            parents = [self.stages[p] for p in stages[0].parents if p in self.stages]
            parent = next((p for p in parents if p.kind == "segment"), None)
            marks = []
            for stage in stages:
                done = list(dict.fromkeys(evals.get(stage.id, [])))
                status = worst([self.stages[e].status for e in done]) if done else ""
                marks.append(Mark(stage.to or 0, stage.status, stage.id, done, status))
            trajectories.append(
                Trajectory(
                    id=folder.rpartition("/")[2],
                    folder=folder,
                    label=stages[0].label,
                    start=stages[0].start or 0,
                    end=stages[-1].to or 0,
                    parent=parent.folder.rpartition("/")[2] if parent is not None else None,
                    rows=list(dict.fromkeys(rows[folder])),
                    users=users[folder],
                    status=worst([stage.status for stage in stages]),
                    marks=marks,
                )
            )
        return trajectories

    def curve(self, trajectory: Trajectory) -> Curve:
        stage = next(s for s in self.stages.values() if s.folder == trajectory.folder)
        folder = folder_of(self.store, stage)
        config = folder.path / "config.yaml"  # there since the trajectory was first started
        pieces = files.read_yaml(config)["semantic"]["lr"] if config.is_file() else []
        return read_curve(folder, trajectory.id, trajectory.start, trajectory.end, pieces)

    def _chain(self, entry: Mapping[str, Any]) -> list[Stage]:
        return [self.stages[stage] for stage in entry["segments"]]

    def _stop(self, entry: Mapping[str, Any]) -> Stage | None:
        """Where a variant's training stopped. One that is scored went to its end, even if its states are gone."""
        evals = [self.stages[stage] for stage in entry["evals"].values()]
        if evals and all(stage.status == "done" for stage in evals):
            return None
        return stopped_at(self._chain(entry))

    def _status(self, entry: Mapping[str, Any]) -> str:
        stop = self._stop(entry)
        if stop is not None:
            return self._status_at(entry, stop)
        return worst([self.stages[stage].status for stage in entry["evals"].values()] or ["done"])

    def _status_at(self, entry: Mapping[str, Any], stop: Stage) -> str:
        """A variant failed or diverged in its own last phase; stopped before that, it is skipped."""
        end = self.stages[entry["segments"][-1]]
        if stop.status in ("failed", "diverged") and stop.kind == "segment" and stop.phase != end.phase:
            return "skipped"
        return stop.status

    def _scores(self, entry: Mapping[str, Any], warnings: list[str]) -> dict[str, Scored]:
        scores: dict[str, Scored] = {}
        for task, stage_id in entry["evals"].items():
            result = folder_of(self.store, self.stages[stage_id]).result
            if result is not None:
                found, bad = read_results(result, task, stage_id)
                scores.update(found)
                warnings += [f"{entry['name']}: {text}; it is left out of the mean." for text in bad]
        return scores


def _shared_pretrainings(groups: Mapping[tuple[bool, str], Sequence[Mapping[str, Any]]]) -> list[str]:
    """In words, what the seeds do not vary: it makes intervals and verdicts look surer than they are."""
    within: list[str] = []
    between: dict[str, set[str]] = {}
    for (pretrained, name), members in groups.items():
        if pretrained:
            continue
        roots = {member["segments"][0] for member in members}
        chains = {tuple(member["segments"]) for member in members}
        if len(chains) > 1 and len(roots) == 1:
            within.append(name)
        for member in members:
            if member.get("pretrained"):
                between.setdefault(member["pretrained"], set()).add(name)
    warnings = []
    if within:
        warnings.append(
            f"All seeds of {_some(within)} share one pretraining seed: the interval over them leaves out how much "
            "pretrainings differ, and understates the variance."
        )
    shared = [fork for fork, names in between.items() if len(names) > 1]
    if shared:
        warnings.append(
            f"Arms share a pretraining seed: they fork from the same state of {_some(shared)}. Differences between "
            "them leave out how much pretrainings differ, and understate the variance of a fresh run."
        )
    return warnings


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _no_study(store: Store, study: str) -> str:
    try:
        names = sorted(n for n in os.listdir(store.root / "studies") if (store.study(n) / "variants.json").is_file())
    except FileNotFoundError:
        names = []
    found = f"It has: {', '.join(names)}." if names else "It has no study yet: zexp run makes one."
    return f"{study!r} is no study in the store '{store.root}'. {found}"
