"""The eval group at plan time: which tasks score a state, and what the ids of their stages hash.

Imports neither torch nor lm_eval nor datasets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zexp.config.errors import ConfigError, Problems
from zexp.config.places import evals_dir
from zexp.evaluate import builders, names
from zexp.evaluate.definitions import Definition, definitions
from zexp.evaluate.fetch import LOCAL
from zexp.store.files import sha256_file

NUMERICS = {"evaluate": 1}  # how requests become token ids and log-likelihoods: model.py
BPB = "bpb"  # the one YAML that serves every source, as bpb_<source>
SMALLEST_CONTEXT = 2


@dataclass(frozen=True)
class SourceInfo:
    """A source that a variant knows. semantic: as recipe.source_semantic says; corpus: the id of its corpus stage."""

    semantic: dict[str, Any]
    corpus: str


@dataclass(frozen=True)
class PlannedTask:
    """One task.

    metrics: names in results.json, None where only running lm-eval tells. documents: the semantic of the `tasks` stage that
    makes its documents, parents: that stage's (kind, id); None and [] for a task with data of its own.
    task, settings, numerics: parts of an eval's semantic. request: what an eval's request["eval"] needs besides batch_size.
    """

    name: str
    metrics: list[str] | None
    documents: dict[str, Any] | None
    parents: list[tuple[str, str]]
    task: dict[str, Any]
    settings: dict[str, Any]
    numerics: dict[str, int]
    request: dict[str, Any] = field(default_factory=dict)


def plan_tasks(
    eval: dict[str, Any],
    *,
    sources: dict[str, SourceInfo],
    tokenizer: str,
    seq_len: int,
    directory: Path,
    cache: Path,
) -> list[PlannedTask]:
    """The tasks that eval.tasks names, in that order, each once.

    sources: name -> what is known of it; `bpb` becomes one task for each. tokenizer: id of the tokenizer stage.
    directory: where ./evals and relative data_files are looked for. cache: for the index of lm-eval's names, which is
    built only for a name that is in no evals/.
    Raises ConfigError with everything that is wrong.
    """
    problems = Problems()
    settings = _settings(eval, seq_len, problems)
    known = _known(directory)
    planned: dict[str, PlannedTask] = {}
    for name in _expanded(eval["tasks"], known, sources):
        try:
            planned.setdefault(name, _plan(name, known, sources, tokenizer, settings, directory, cache))
        except ConfigError as error:
            problems.extend(error.problems)
    problems.raise_if_any()
    return list(planned.values())


def eval_semantic(planned: PlannedTask, tasks_id: str | None, state: dict[str, Any]) -> dict[str, Any]:
    """The semantic block of an eval stage. state: {id, tokens}. tasks_id: id of planned.documents' stage, None without."""
    return {
        "state": {"id": state["id"], "tokens": state["tokens"]},
        "task": planned.task,
        "tasks": tasks_id,
        "settings": planned.settings,
        "numerics": planned.numerics,
    }


def _settings(eval: dict[str, Any], seq_len: int, problems: Problems) -> dict[str, Any]:
    """context_tokens, and limit where it is set (absent = all documents)."""
    context = eval.get("context_tokens")
    context = seq_len if context is None else context
    if not isinstance(context, int) or isinstance(context, bool) or context < SMALLEST_CONTEXT:
        problems.add(
            f"eval.context_tokens = {context!r}: a model has to see at least {SMALLEST_CONTEXT} tokens. "
            "Give a number of tokens, or null for seq_len."
        )
    settings: dict[str, Any] = {"context_tokens": context}
    limit = eval.get("limit")
    if limit is not None:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            problems.add(f"eval.limit = {limit!r}: a number of documents, at least 1, or null for all.")
        settings["limit"] = limit
    batch = eval.get("batch_size", 1)
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        problems.add(f"eval.batch_size = {batch!r}: a number of sequences, at least 1.")
    return settings


def _known(directory: Path) -> dict[str, Definition]:
    """Task name -> definition; a YAML in ./evals goes before zexp's own of the same name."""
    known: dict[str, Definition] = {}
    mine = directory / "evals"
    folders = [mine] if mine.is_dir() else []
    for folder in [*folders, evals_dir()]:
        here: dict[str, Definition] = {}
        for definition in definitions(folder):
            if definition.name in here:
                raise ConfigError(
                    f"{definition.path} and {here[definition.name].path} both define the task {definition.name!r}. "
                    "Rename one."
                )
            here[definition.name] = definition
        known = {**here, **known}
    return known


def _expanded(tasks: list[str], known: dict[str, Definition], sources: dict[str, SourceInfo]) -> list[str]:
    """`bpb` as one name per source, in the sources' order."""
    found: list[str] = []
    for name in tasks:
        if name == BPB and BPB in known:
            found += [f"{BPB}_{source}" for source in sources]
        else:
            found.append(name)
    return list(dict.fromkeys(found))


def _plan(
    name: str,
    known: dict[str, Definition],
    sources: dict[str, SourceInfo],
    tokenizer: str,
    settings: dict[str, Any],
    directory: Path,
    cache: Path,
) -> PlannedTask:
    definition = known.get(name)
    source: str | None = None
    if definition is None and name.startswith(f"{BPB}_") and BPB in known:
        definition, source = known[BPB], name.removeprefix(f"{BPB}_")
    if definition is None:
        return _lm_evals_own(name, known, sources, settings, cache)
    config = {**definition.config, "task": name} if source is not None else definition.config
    task: dict[str, Any] = {"name": name, "yaml": config}
    numerics, request = dict(NUMERICS), {"yaml": str(definition.path.resolve()), "directory": str(directory.resolve())}
    if definition.documents is None:
        task["files"] = _fingerprints(definition, directory)
        return PlannedTask(name, definition.metrics, None, [], task, settings, numerics, request)
    documents, parents = _documents(definition, name, source, sources, tokenizer)
    if code := _fingerprints(definition, directory):
        task["files"] = code
    return PlannedTask(name, definition.metrics, documents, parents, task, settings, numerics, request)


def _documents(
    definition: Definition, name: str, source: str | None, sources: dict[str, SourceInfo], tokenizer: str
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The semantic of the `tasks` stage, and its parents."""
    asked = dict(definition.documents or {})
    if source is not None:
        asked["source"] = source
    where = f"the task {name} ({definition.path}), metadata.zexp.documents"
    options, reads = builders.check(asked, where)
    source = asked.get("source")
    semantic: dict[str, Any] = {"task": name, "documents": options, "corpus": None, "tokenizer": None}
    parents: list[tuple[str, str]] = []
    if builders.CORPUS in reads:
        if source not in sources:
            raise ConfigError(
                f"eval.tasks: {name} reads held-out text of the source {source!r}, which is not among this run's sources: "
                f"{', '.join(sources) or 'there are none'}. Take {name} out of eval.tasks, or add the source."
            )
        info = sources[source]
        if builders.SIGNATURES in reads and not _has_signatures(info.semantic):
            raise ConfigError(
                f"eval.tasks: {name} needs docstrings with their signatures, which only an embedded source with "
                f"view: high_quality has; {source!r} is {_said(info.semantic)}. Take {name} out of eval.tasks: "
                "`bpb` works on any source (eval=bpb)."
            )
        semantic["corpus"] = info.corpus
        parents.append(("corpus", info.corpus))
    if builders.TOKENIZER in reads:
        semantic["tokenizer"] = tokenizer
        parents.append(("tokenizer", tokenizer))
    semantic["numerics"] = builders.numerics(options["builder"])
    return semantic, parents


def _has_signatures(source: dict[str, Any]) -> bool:
    return source.get("kind") == "embedded" and source.get("view") == "high_quality"


def _said(source: dict[str, Any]) -> str:
    view = source.get("view")
    return f"of kind {source.get('kind')}" + (f" with view: {view}" if view else "")


def _lm_evals_own(
    name: str,
    known: dict[str, Definition],
    sources: dict[str, SourceInfo],
    settings: dict[str, Any],
    cache: Path,
) -> PlannedTask:
    index = names.lm_eval_names(cache)
    if name not in index:
        ours = [BPB, *(f"{BPB}_{source}" for source in sources), *(n for n in known if n != BPB)]
        close = names.near(name, [*ours, *index])
        meant = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(
            f"eval.tasks: there is no task {name!r}: not in ./evals, not in zexp's evals/ ({', '.join(sorted(ours))}), and not "
            f"among the {len(index):,} of lm-eval {names.lm_eval_version()}.{meant}"
        )
    task = {"name": name, "yaml": None, "lm_eval": names.lm_eval_version()}
    return PlannedTask(name, None, None, [], task, settings, dict(NUMERICS), {"index": index[name]})


def _fingerprints(definition: Definition, directory: Path) -> dict[str, Any]:
    """Relative name -> {bytes, sha256} of a task's Python files and local data files.

    Raises ConfigError for a data file that is not there, or a local dataset without data_files.
    """
    found: dict[str, Path] = {
        file.relative_to(definition.path.parent).as_posix(): file for file in definition.files if file.suffix == ".py"
    }
    if definition.documents is None and definition.config.get("dataset_path") in LOCAL:
        kwargs = definition.config.get("dataset_kwargs")
        listed = list(_data_files(kwargs.get("data_files") if isinstance(kwargs, dict) else None))
        if not listed:
            raise ConfigError(
                f"{definition.path}: dataset_path is {definition.config['dataset_path']}, so dataset_kwargs.data_files must "
                "name local files, e.g. {test: evals/mine.jsonl}."
            )
        for name in listed:
            path = directory / name
            if not path.is_file():
                raise ConfigError(
                    f"{definition.path}: dataset_kwargs.data_files names {name!r}, and there is no such file in {directory}. "
                    "Paths are relative to the working directory."
                )
            found[name] = path
    return {name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for name, path in sorted(found.items())}


def _data_files(value: Any) -> list[str]:
    """Every file name in data_files: a name, a list of names, or a map of splits to either."""
    if isinstance(value, str):
        return [value]
    parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [name for part in parts for name in _data_files(part)]
