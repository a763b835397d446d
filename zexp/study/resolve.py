"""A composed config to a resolved variant: its model, its data stages, its chain of segments, its evaluations.

Everything is looked up and checked here, before anything starts: the mistakes of all variants are reported together.
What many variants share (sources, tokenizers, models) is resolved once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from zexp.blocks import resolve as blocks_resolve
from zexp.calc import match as calc_match
from zexp.calc import model as calc_model
from zexp.calc.layout import AUTO, Layout
from zexp.config.errors import ConfigError, Problems
from zexp.config.identity import semantic_dict
from zexp.config.schema import Mix, Run, Source
from zexp.data import recipe
from zexp.evaluate import plan as evaluate_plan
from zexp.kernels import select
from zexp.model.hf import folder as hf_folder
from zexp.store.fingerprint import DigestCache
from zexp.store.ids import semantic_id
from zexp.study import ranks, variants
from zexp.study.typed import run_of
from zexp.train import phases


@dataclass(frozen=True)
class Composed:
    """One composed config, the group choices and axes that name it, and the overrides that made it."""

    config: DictConfig
    choices: dict[str, str | None]
    axes: dict[str, Any]
    overrides: list[str]
    typed: Callable[[], Run] | None = None  # the config's Run, where whoever composed it knows it; shares parts with others

    def run(self) -> Run:
        """The typed Run, to be read only. Raises ConfigError as run_of does."""
        return run_of(self.config) if self.typed is None else self.typed()


@dataclass(frozen=True)
class DataStage:
    """A tokenizer, corpus, packing or tasks stage. source: the name that the user gave it; request: what it is told besides
    its semantic block.
    """

    kind: str
    id: str
    semantic: dict[str, Any]
    parents: list[tuple[str, str]]
    source: str | None = None
    tokens_bound: int = 0
    request: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalStage:
    """One task on one state: index of the segment whose end is scored, and its tokens.

    metrics: what the task scores; None if only lm-eval knows.
    """

    id: str
    semantic: dict[str, Any]
    task: str
    segment: int
    tokens: int
    parents: list[tuple[str, str]]
    request: dict[str, Any]
    metrics: list[str] | None


@dataclass
class Variant:
    """One resolved variant of a study."""

    name: str
    row: str
    axes: dict[str, Any]
    arch: str
    anneal: str | None
    overrides: list[str]
    run: Run
    model: dict[str, Any]
    match: calc_match.Match | None  # what arch.match solved for
    parameters: dict[str, int]
    flops_per_token: dict[str, float]
    chain: phases.Chain
    data: list[DataStage]
    evals: list[EvalStage]
    sources: dict[str, str]  # packing id -> the source's name
    source_bounds: dict[str, int]  # packing id -> upper bound of its tokens, known before it is built
    epoch_caps: dict[str, int | None]  # packing id -> max_epochs
    directory: str  # what relative paths of its sources are relative to

    @property
    def seed(self) -> int:
        return self.run.seed

    @property
    def pretrained(self) -> phases.PhaseSpan | None:
        """The phase that the anneal forks from, if there is an anneal."""
        return self.chain.phases[-2] if self.run.anneal is not None else None


# The semantic block, what arch.match solved, numerics, parameters, FLOPs a token.
ResolvedModel = tuple[dict[str, Any], calc_match.Match | None, dict[str, int], dict[str, int], dict[str, float]]


@dataclass
class Resolver:
    """Resolves variants of one study; memoises what they share.

    store_root: for the caches of file digests and task names; directory: what relative paths are relative to; launcher:
    hydra.launcher.backend, which says over how many machines a training can be spread.
    """

    store_root: Path
    directory: Path
    launcher: str = "local"
    _sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    _models: dict[str, ResolvedModel] = field(default_factory=dict)
    _tasks: dict[str, list[evaluate_plan.PlannedTask]] = field(default_factory=dict)
    _inits: dict[str, dict[str, Any]] = field(default_factory=dict)

    def variants(self, composed: list[Composed]) -> list[Variant]:
        """All variants. Raises ConfigError with every mistake of every variant, and for two of one name."""
        problems = Problems()
        result: list[Variant] = []
        for one in composed:
            try:
                result.append(self.variant(one))
            except ConfigError as error:
                problems.extend(error.problems)
        problems.raise_if_any()
        seen: dict[str, Variant] = {}
        for variant in result:
            if variant.name in seen:
                problems.add(f"two variants are both named {variant.name!r}. Give the axis that tells them apart in the grid or arms.")
            seen[variant.name] = variant
        problems.raise_if_any()
        return result

    def variant(self, composed: Composed) -> Variant:
        """One variant, checked whole. Raises ConfigError with all its mistakes."""
        run = composed.run()
        problems = Problems()
        check_execution(run, problems)
        ranks.check(run.parallelism, self.launcher, problems)
        sources = _sources_of(run, problems)
        model = self._collect(problems, lambda: self._model(run))
        data = self._collect(problems, lambda: self._data(run, sources))
        # A mistake here does not hide those of the phases and tasks: they are checked against stand-ins, and nothing is
        # returned.
        resolved_model, match, model_numerics, parameters, flops = model or ({}, None, {}, {}, {})
        init = None if model is None else self._collect(problems, lambda: self._init(run, resolved_model))
        packings = data[2] if data is not None else {}
        packing_ids = {name: packings[name].id if name in packings else name for name in sources}
        tokenizer_id = data[0].id if data is not None else ""
        if model is not None:
            operations = select.operations_of(model_numerics)
            self._collect(problems, lambda: select.check(run.kernels.backend, operations, run.execution.device))
        chain = self._collect(
            problems,
            lambda: phases.compile_chain(
                run,
                model=resolved_model,
                model_numerics=model_numerics,
                tokenizer=tokenizer_id,
                packing=lambda name, _source: packing_ids.get(name, name),
                init=init,
            ),
        )
        planned = None if data is None else self._collect(problems, lambda: self._planned_tasks(run, data[1], data[0]))
        if chain is not None:
            ranks.check_batches(run, chain.phases, problems)
        problems.raise_if_any()
        assert chain is not None and planned is not None and data is not None
        tokenizer, corpora, packings = data
        used = {e["packing"] for s in chain.segments for e in s.semantic["streams"] if "packing" in e}
        by_packing = {stage.id: name for name, stage in packings.items() if stage.id in used}
        arch = composed.choices.get("arch") or "arch"
        anneal = composed.choices.get("anneal") if run.anneal is not None else None
        variant = Variant(
            name=variants.name_of(composed.axes, arch, anneal),
            row=variants.row_of(composed.axes, arch, anneal),
            axes=dict(composed.axes),
            arch=arch,
            anneal=anneal,
            overrides=composed.overrides,
            run=run,
            model=resolved_model,
            match=match,
            parameters=parameters,
            flops_per_token=flops,
            chain=chain,
            data=[],
            evals=[],
            sources=by_packing,
            source_bounds={id: packings[name].tokens_bound for id, name in by_packing.items()},
            epoch_caps={id: _epoch_cap(run, name) for id, name in by_packing.items()},
            directory=str(self.directory),
        )
        tasks = self._evals(variant, planned)
        corpus_ids = {parent for id in used for _, parent in packings[by_packing[id]].parents}
        corpus_ids |= {id for stage in tasks for kind, id in stage.parents if kind == "corpus"}
        variant.data = [
            tokenizer,
            *(stage for stage in corpora.values() if stage.id in corpus_ids),
            *(packings[name] for name in by_packing.values()),
            *tasks,
        ]
        return variant

    def _collect(self, problems: Problems, resolve: Any) -> Any:
        try:
            return resolve()
        except ConfigError as error:
            problems.extend(error.problems)
            return None

    def _model(self, run: Run) -> ResolvedModel:
        arch = semantic_dict(run.arch)
        vocab = vocab_size(run, self.directory)
        key = json.dumps([arch, vocab, run.seq_len], sort_keys=True)
        if key not in self._models:
            model, match = calc_match.resolve(arch, vocab, run.seq_len)
            self._models[key] = (
                model,
                match,
                blocks_resolve.numerics(model),
                calc_model.parameters(model),
                calc_model.flops_per_token(model, run.seq_len) if run.seq_len > 0 else {},
            )
        return self._models[key]

    def _init(self, run: Run, model: dict[str, Any]) -> dict[str, Any] | None:
        """What stands in a root segment for weights that are not drawn. Raises ConfigError if the folder is not this model's."""
        path = run.init.from_hf
        if path is None:
            return None
        if run.seeds.init is not None:
            raise ConfigError(f"seeds.init = {run.seeds.init} draws no weights: they come from init.from_hf. Set it to null.")
        if run.arch.match is not None:
            raise ConfigError(
                f"arch.match and init.from_hf are both set: {path} holds weights of one size, and arch.match chooses "
                "others.\n  Set arch.match to null and write the sizes that the weights have, or draw the weights "
                "(init.from_hf=null)."
            )
        key = json.dumps([path, model], sort_keys=True)
        if key not in self._inits:
            found = hf_folder.read(self.directory / Path(path).expanduser(), "init.from_hf")
            family = hf_folder.check(found, model, "init.from_hf")
            cache = DigestCache(self.store_root / "cache" / "files.json")
            self._inits[key] = hf_folder.init_semantic(found, family, cache)
        return self._inits[key]

    def _source(self, name: str, source: Source, key: str) -> dict[str, Any]:
        keys = {k: getattr(source, k) for k in Source.__dataclass_fields__}
        memo = json.dumps([name, keys], sort_keys=True)
        if memo not in self._sources:
            self._sources[memo] = recipe.source_semantic(
                name, keys, store_root=self.store_root, directory=self.directory, key=key
            )
        return self._sources[memo]

    def _data(
        self, run: Run, sources: dict[str, tuple[Source, str]]
    ) -> tuple[DataStage, dict[str, DataStage], dict[str, DataStage]]:
        """The tokenizer's, the corpora's and the packings' stages; the last two by source name."""
        problems = Problems()
        semantics: dict[str, dict[str, Any]] = {}
        for name, (source, key) in sources.items():
            try:
                semantics[name] = self._source(name, source, key)
            except ConfigError as error:
                problems.extend(error.problems)
        problems.raise_if_any()
        corpus = asdict(run.corpus)
        own = {name: semantics[name] for name in run.corpus.sources}
        tokenizer_semantic = recipe.tokenizer_semantic(
            corpus, own, store_root=self.store_root, directory=self.directory
        )
        request = {"tokenizer": run.corpus.tokenizer.path} if run.corpus.tokenizer.path is not None else {}
        tokenizer = DataStage("tokenizer", semantic_id(tokenizer_semantic), tokenizer_semantic, [], request=request)
        corpora: dict[str, DataStage] = {}
        packings: dict[str, DataStage] = {}
        for name, semantic in semantics.items():
            bound = recipe.tokens_bound(semantic)
            made = recipe.corpus_semantic(corpus, semantic, tokenizer.id)
            corpora[name] = DataStage("corpus", semantic_id(made), made, [("tokenizer", tokenizer.id)], name, bound)
            packed = recipe.packing_semantic(corpus, corpora[name].id, run.seq_len)
            twin = next((other for other, stage in packings.items() if stage.id == semantic_id(packed)), None)
            if twin is not None:
                problems.add(f"{sources[name][1]} and {sources[twin][1]} are the same source. Keep one and add their weights.")
            packings[name] = DataStage("packing", semantic_id(packed), packed, [("corpus", corpora[name].id)], name, bound)
        problems.raise_if_any()
        return tokenizer, corpora, packings

    def _planned_tasks(
        self, run: Run, corpora: dict[str, DataStage], tokenizer: DataStage
    ) -> list[evaluate_plan.PlannedTask]:
        node = {
            "tasks": list(run.eval.tasks),
            "context_tokens": run.eval.context_tokens,
            "limit": run.eval.limit,
            "batch_size": run.eval.batch_size,
        }
        key = json.dumps([node, run.seq_len, tokenizer.id, {n: s.id for n, s in corpora.items()}], sort_keys=True)
        if key not in self._tasks:
            infos = {
                name: evaluate_plan.SourceInfo(semantic=stage.semantic["source"], corpus=stage.id)
                for name, stage in corpora.items()
            }
            self._tasks[key] = evaluate_plan.plan_tasks(
                node,
                sources=infos,
                tokenizer=tokenizer.id,
                seq_len=run.seq_len,
                directory=self.directory,
                cache=self.store_root / "cache",
            )
        return self._tasks[key]

    def _evals(self, variant: Variant, planned: list[evaluate_plan.PlannedTask]) -> list[DataStage]:
        """Fill variant.evals for its pretrained and its last state; the tasks stages that they need."""
        states = [variant.chain.phases[-1]]
        if variant.pretrained is not None:
            states.insert(0, variant.pretrained)
        stages: dict[str, DataStage] = {}
        for task in planned:
            tasks_id = None
            if task.documents is not None:
                tasks_id = semantic_id(task.documents)
                stages[tasks_id] = DataStage("tasks", tasks_id, task.documents, list(task.parents), task.name)
            for span in states:
                segment = variant.chain.segments[span.last_segment]
                semantic = evaluate_plan.eval_semantic(task, tasks_id, {"id": segment.id, "tokens": span.to})
                parents = [("tasks", tasks_id)] if tasks_id is not None else []
                variant.evals.append(
                    EvalStage(
                        id=semantic_id(semantic),
                        semantic=semantic,
                        task=task.name,
                        segment=span.last_segment,
                        tokens=span.to,
                        parents=list(parents),
                        request=dict(task.request),
                        metrics=task.metrics,
                    )
                )
        return list(stages.values())


def layout_of(run: Run) -> Layout:
    """How the config spreads a model over devices. Of activation_checkpointing=auto it is what a device with room has: none."""
    group = run.parallelism
    checkpointing = "none" if group.activation_checkpointing == AUTO else group.activation_checkpointing
    return Layout(
        data=group.data,
        zero=group.zero,
        tensor=group.tensor,
        expert=group.expert,
        checkpointing=checkpointing,
    )


def vocab_size(run: Run, directory: Path) -> int:
    """Token ids that the run's tokenizer can give, at most. Raises ConfigError if that is a published one that is not there."""
    return recipe.vocab_size(asdict(run.corpus.tokenizer), directory)


def _mixes(run: Run) -> list[tuple[str, Mix]]:
    """The mixes that a phase reads, with their keys; the root's only if one does."""
    found: list[tuple[str, Mix]] = []
    for name, phase in run.phases.items():
        found.append((f"phases.{name}.mix", phase.mix) if phase.mix is not None else ("mix", run.mix))
    if run.anneal is not None and run.anneal.replay.fraction < 1.0:
        found.append(("anneal.mix", run.anneal.mix) if run.anneal.mix is not None else ("mix", run.mix))
    return found


def _sources_of(run: Run, problems: Problems) -> dict[str, tuple[Source, str]]:
    """Name -> (definition, key), of corpus.sources and of the mixes' own. One name with two definitions is an error."""
    sources: dict[str, tuple[Source, str]] = {
        name: (source, f"corpus.sources.{name}") for name, source in run.corpus.sources.items()
    }
    if not run.corpus.sources and run.corpus.tokenizer.kind == "bpe":
        problems.add("corpus.sources is empty. The tokenizer is trained on them: name at least one source.")
    for key, mix in _mixes(run):
        for name, source in mix.sources.items():
            own = f"{key}.sources.{name}"
            if source.kind is None:
                if name not in sources:
                    problems.add(
                        f"{own} names no source of corpus.sources ({', '.join(run.corpus.sources) or 'none'}) and has no "
                        "`kind` of its own. Correct the name, or define it here."
                    )
            elif name in sources and not _same_source(sources[name][0], source):
                problems.add(f"{own} and {sources[name][1]} define one name differently. Rename one.")
            else:
                sources.setdefault(name, (source, own))
    return sources


def _same_source(one: Source, other: Source) -> bool:
    return all(getattr(one, key) == getattr(other, key) for key in Source.__dataclass_fields__)


def _epoch_cap(run: Run, name: str) -> int | None:
    """The smallest cap that a mix of the run puts on a source."""
    caps = [mix.sources[name].max_epochs for _, mix in _mixes(run) if name in mix.sources]
    given = [cap for cap in caps if cap is not None]
    return min(given) if given else None


def check_execution(run: Run, problems: Problems) -> None:
    """Collect the mistakes of the execution keys."""
    if run.execution.micro_batch <= 0:
        problems.add(f"execution.micro_batch = {run.execution.micro_batch} must be above 0.")
    layout = layout_of(run)
    illegal = layout.problems(None)
    problems.extend(illegal)
    for key, value, alone in (
        ("zero", layout.zero, 0),
        ("tensor", layout.tensor, 1),
        ("expert", layout.expert, 1),
    ):
        if value != alone and not illegal:
            problems.add(
                f"parallelism.{key} = {value}: a training does without it so far; `zexp calc` counts such a layout."
                f"\n  Set parallelism.{key} to {alone}."
            )
    if run.parallelism.threads <= 0:
        problems.add(f"parallelism.threads = {run.parallelism.threads} must be above 0.")
    if run.execution.log_every <= 0:
        problems.add(f"execution.log_every = {run.execution.log_every} must be above 0.")
    if run.checkpoint.keep.rolling < 1:
        problems.add(f"checkpoint.keep.rolling = {run.checkpoint.keep.rolling} must be 1 or more: a killed stage resumes from it.")
    if run.checkpoint.keep.ends not in ("weights", "all"):
        problems.add(f"checkpoint.keep.ends = {run.checkpoint.keep.ends!r}; it is weights or all.")
    if not run.checkpoint.every_seconds > 0:
        problems.add(f"checkpoint.every_seconds = {run.checkpoint.every_seconds} must be above 0.")
    if not run.execution.divergence.margin >= 0:
        problems.add(f"execution.divergence.margin = {run.execution.divergence.margin} must be 0 or above.")
    if run.execution.divergence.steps < 1:
        problems.add(f"execution.divergence.steps = {run.execution.divergence.steps} must be 1 or more.")
    if run.execution.device not in ("auto", "cpu", "cuda"):
        problems.add(f"execution.device = {run.execution.device!r}; it is auto, cpu or cuda.")
    if run.logger.kind not in ("jsonl", "wandb"):
        problems.add(f"logger.kind = {run.logger.kind!r}; it is jsonl or wandb.")
