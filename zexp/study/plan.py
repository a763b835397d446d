"""The tree of unique stages of a study: what variants share is one node, and the store says what is done.

A segment's stage is cut at every token count that some variant needs, so its id `<hash16>@<tokens>` does not depend on
the rest of the plan. Nothing here starts anything or imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zexp.config.errors import ConfigError, Problems
from zexp.config.tokens import round_up
from zexp.data import ledger
from zexp.store.files import read_json
from zexp.store.folder import Store
from zexp.store.ids import short
from zexp.study import ranks
from zexp.study.resolve import DataStage, EvalStage, Variant
from zexp.study.variants import name_of
from zexp.train.phases import Segment

STATE_BYTES_PER_PARAMETER = 12  # fp32 weights and AdamW's two moments
BYTES_PER_TOKEN = 2 + 2  # uint16 tokens of a corpus, and its packed copy's share


@dataclass
class Stage:
    """One node of the plan.

    id: what dependants name; owner: whose it is, the beginning of a segment's or an eval's label; folder: relative to
    the store; start, to, tokens: of a segment, absolute and trained here; cached: done already; weights_only: a segment's
    state is there without its optimizer, so nothing can be trained from it; needed: something that is not done asks for
    it; resume_from: the nearest kept state of a segment that is not done, from which the rest is trained.
    """

    id: str
    kind: str
    full_id: str
    semantic: dict[str, Any]
    parents: list[str]
    phase: str | None = None
    label: str = ""
    owner: str = ""
    start: int | None = None
    to: int | None = None
    tokens: int = 0
    cached: bool = False
    weights_only: bool = False
    variants: list[str] = field(default_factory=list)
    request: dict[str, Any] = field(default_factory=dict)
    flops_per_token: float = 0.0
    parameters: int = 0
    tokens_bound: int = 0
    diverged: dict[str, Any] | None = None
    needed: bool = False
    resume_from: int | None = None

    @property
    def to_train(self) -> int:
        """Tokens that are trained if the plan runs."""
        if self.kind != "segment" or not self.needed:
            return 0
        assert self.to is not None and self.start is not None
        return self.to - (self.start if self.resume_from is None else self.resume_from)

    @property
    def folder(self) -> str:
        kind = "trajectory" if self.kind == "segment" else self.kind
        return f"{kind}/{short(self.full_id)}"

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "kind": self.kind,
            "phase": self.phase,
            "label": self.label,
            "folder": self.folder,
            "parents": self.parents,
            "variants": self.variants,
            "from": self.start,
            "to": self.to,
            "tokens": self.tokens,
            "cached": self.cached,
            "needed": self.needed,
            "resume_from": self.resume_from,
        }


@dataclass
class Plan:
    """The stages in an order in which parents come first, and the variants that they serve."""

    stages: dict[str, Stage]
    variants: list[Variant]
    segments: dict[str, list[str]]  # variant name -> its segment stages, root to end
    evals: dict[str, dict[str, str]]  # variant name -> task -> stage, of its last state
    pretrained_evals: dict[str, dict[str, str]]  # the same of the state that its anneal forks from
    pretrained_stage: dict[str, str]  # variant name -> the segment stage that ends in that state

    @property
    def to_do(self) -> list[Stage]:
        """Stages to run: not done, and asked for by an end, or by an evaluation that is not done."""
        return [stage for stage in self.stages.values() if stage.needed]

    def tokens(self) -> dict[str, int]:
        """unshared: every variant trained alone; shared: the tree counted once; to_train: what the store lacks."""
        segments = [stage for stage in self.stages.values() if stage.kind == "segment"]
        return {
            "to_train": sum(stage.to_train for stage in segments),
            "shared": sum(stage.tokens for stage in segments),
            "unshared": sum(variant.chain.tokens for variant in self.variants),
        }

    def train_flops(self) -> dict[str, float]:
        """FLOPs of training, as `tokens` counts them."""
        segments = [stage for stage in self.stages.values() if stage.kind == "segment"]
        return {
            "to_train": sum(stage.to_train * stage.flops_per_token for stage in segments),
            "shared": sum(stage.tokens * stage.flops_per_token for stage in segments),
            "unshared": sum(v.chain.tokens * v.flops_per_token["train"] for v in self.variants),
        }

    def goes_on(self, stage: Stage, parent: str) -> bool:
        """True if `stage` is trained from the state of `parent` and reads its optimizer."""
        before = self.stages[parent]
        if stage.kind != "segment" or before.kind != "segment":
            return False
        return before.full_id == stage.full_id or stage.semantic["optimizer_state"] == "carry"

    def forked(self) -> set[str]:
        """The segment stages whose state is trained on from, optimizer and all."""
        return {parent for stage in self.stages.values() for parent in stage.parents if self.goes_on(stage, parent)}

    def evals_of(self) -> dict[str, list[Stage]]:
        """Segment stage -> the evaluations of its state."""
        found: dict[str, list[Stage]] = {}
        for stage in self.stages.values():
            if stage.kind == "eval":
                found.setdefault(stage.parents[0], []).append(stage)
        return found

    def scored_ends(self) -> list[Stage]:
        """Segment stages that nothing in this plan goes on from, and that only evaluations read.

        Not those of open segments, from which a longer run goes on, nor of a pretraining in one segment (a cosine), which
        a later fork would have to train from the beginning.
        """
        ends = [self.stages[id] for id in self.evals_of().keys() - self.forked()]
        return [s for s in ends if s.semantic["lr"][-1]["to"] is not None and s.semantic["parent"] is not None]

    def disk_bytes(self) -> int:
        """Upper estimate of what the stages to do will write and keep: states with optimizer, corpora, packings."""
        total = 0
        for stage in self.to_do:
            if stage.kind == "segment":
                rolling = stage.request["checkpoint"]["rolling"]
                kept = len([t for t in stage.request["keep"] if (stage.start or 0) < t <= (stage.to or 0)])
                total += (kept + rolling) * STATE_BYTES_PER_PARAMETER * stage.parameters
            elif stage.kind in ("corpus", "packing"):
                total += stage.tokens_bound * BYTES_PER_TOKEN
        return total

    def ends(self, phase_of_anneal: bool) -> set[str]:
        """Segment stages in which anneals end (True), or the states that they fork from, or ends without an anneal."""
        found = set()
        for variant in self.variants:
            if variant.run.anneal is not None and phase_of_anneal:
                found.add(self.segments[variant.name][-1])
            elif variant.run.anneal is not None:
                found.add(self.pretrained_stage[variant.name])
            elif not phase_of_anneal:
                found.add(self.segments[variant.name][-1])
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "variants": len(self.variants),
            "pretrainings": len(self.ends(phase_of_anneal=False)),
            "anneals": len(self.ends(phase_of_anneal=True)),
            "stages": [stage.to_json() for stage in self.stages.values()],
            "tokens": self.tokens(),
            "train_flops": self.train_flops(),
            "disk_bytes": self.disk_bytes(),
            "matched": {v.name: v.match.to_json() for v in self.variants if v.match is not None},
            "ledger": [
                {"variant": variant.name, **ledger_of(variant, bins_known(self, variant, None)).to_json()}
                for variant in self.variants
            ],
        }


def build(variants: list[Variant], store: Store) -> Plan:
    """The plan of resolved variants against a store, which may be empty.

    Raises ConfigError when a source runs out of windows within its epoch cap, as far as that can be known now.
    """
    stages: dict[str, Stage] = {}
    plan = Plan(stages, variants, {}, {}, {}, {})
    cuts = _cuts(variants)
    for variant in variants:
        for data in variant.data:
            _add_data(stages, data, variant)
        _add_segments(plan, variant, cuts)
        _add_evals(plan, variant)
    _tell_apart(plan)
    ordered = _parents_first(stages)
    stages.clear()
    stages.update(ordered)
    mark(plan, store)
    return plan


def mark(plan: Plan, store: Store) -> bool:
    """Look into the store: what is done, and what is needed for the rest. True if that differs from the last look."""
    before = {stage.id: (stage.needed, stage.request.get("optimizer")) for stage in plan.stages.values()}
    for stage in plan.stages.values():
        stage.needed, stage.diverged = False, None
        if stage.kind == "segment":
            stage.request["optimizer"] = False
    _mark_cached(plan.stages, store)
    _mark_needed(plan)
    return before != {stage.id: (stage.needed, stage.request.get("optimizer")) for stage in plan.stages.values()}


def check_sources(plan: Plan, store: Store | None) -> None:
    """Refuse mixes that run out: exact where packings are built (store), else bounded by their bytes.

    Raises ConfigError naming source, need and supply.
    """
    problems = Problems()
    for variant in plan.variants:
        problems.extend(ledger_of(variant, bins_known(plan, variant, store)).problems())
    problems.raise_if_any()


def bins_known(plan: Plan, variant: Variant, store: Store | None) -> dict[str, ledger.Supply]:
    """Packing id -> how many windows it has, exactly if it is built, else at most."""
    supplies = {}
    for packing, name in variant.sources.items():
        manifest = None
        if store is not None:
            result = store.folder("packing", packing).result
            manifest = read_json(result / "manifest.json") if result is not None else None
        exact = manifest is not None
        bins = manifest["bins"] if manifest is not None else variant.source_bounds[packing] // variant.run.seq_len
        supplies[packing] = ledger.Supply(name, bins, exact, variant.epoch_caps[packing])
    return supplies


def ledger_of(variant: Variant, supplies: dict[str, ledger.Supply]) -> ledger.Ledger:
    """Tokens and epochs per source over the variant's chain."""
    chain = [(segment.id, segment.semantic) for segment in variant.chain.segments]
    return ledger.Ledger.of(chain, variant.chain.tokens, supplies)


def _cuts(variants: Iterable[Variant]) -> dict[str, list[int]]:
    """Trajectory id -> every token count that some variant needs, ascending."""
    cuts: dict[str, set[int]] = {}
    for variant in variants:
        for index, segment in enumerate(variant.chain.segments):
            wanted = cuts.setdefault(segment.id, set())
            wanted.add(segment.to)
            wanted.update(e.tokens for e in variant.evals if e.segment == index)
    return {id: sorted(tokens) for id, tokens in cuts.items()}


def _add_data(stages: dict[str, Stage], data: DataStage, variant: Variant) -> None:
    id = short(data.id)
    if id not in stages:
        stages[id] = Stage(
            id=id,
            kind=data.kind,
            full_id=data.id,
            semantic=data.semantic,
            parents=[short(parent) for _, parent in data.parents],
            label=f"{data.kind} {data.source}" if data.source else data.kind,
            request={"threads": variant.run.parallelism.threads, "directory": variant.directory, **data.request},
            tokens_bound=data.tokens_bound,
        )
    _serve(stages[id], variant)


def _add_segments(plan: Plan, variant: Variant, cuts: dict[str, list[int]]) -> None:
    ids: list[str] = []
    previous: str | None = None
    pretrained = variant.pretrained
    tokenizer = next(short(stage.id) for stage in variant.data if stage.kind == "tokenizer")
    for index, segment in enumerate(variant.chain.segments):
        begin = segment.start
        data = [short(id) for id in packings_read(variant.chain.segments[: index + 1])]
        if index == 0:
            data.insert(0, tokenizer)
        for cut in (tokens for tokens in cuts[segment.id] if tokens <= segment.to):
            id = f"{short(segment.id)}@{cut}"
            if id not in plan.stages:
                plan.stages[id] = _segment_stage(id, segment, begin, cut, previous, data, variant, cuts)
            _serve(plan.stages[id], variant)
            ids.append(id)
            if pretrained is not None and index == pretrained.last_segment and cut == pretrained.to:
                plan.pretrained_stage[variant.name] = id
            previous, begin = id, cut
    plan.segments[variant.name] = ids


def _segment_stage(
    id: str,
    segment: Segment,
    begin: int,
    cut: int,
    previous: str | None,
    data: list[str],
    variant: Variant,
    cuts: dict[str, list[int]],
) -> Stage:
    run = variant.run
    keep = set(cuts[segment.id]) | (
        ladder(segment.start, cut, segment.semantic["batch"][-1]["tokens"]) if run.checkpoint.keep.ladder else set()
    )
    # Where a root's weights lie; what they are is in its semantic block.
    path = run.init.from_hf if segment.semantic["parent"] is None else None
    given = {} if path is None else {"from_hf": str(Path(variant.directory, Path(path).expanduser()))}
    label = segment.phase if segment.phase == "anneal" else f"{segment.phase}{'' if segment.is_open else ' decay'}"
    name = variant.row if segment.phase == "anneal" else variant.arch
    return Stage(
        id=id,
        kind="segment",
        full_id=segment.id,
        semantic=segment.semantic,
        parents=[previous, *data] if previous is not None else data,
        phase=segment.phase,
        label=f"{name} {label}",
        owner=name,
        start=begin,
        to=cut,
        tokens=cut - begin,
        request={
            "to": cut,
            "optimizer": False,
            "keep": sorted(keep),
            "micro_batch": run.execution.micro_batch,
            "threads": run.parallelism.threads,
            "activation_checkpointing": run.parallelism.activation_checkpointing,
            "ranks": ranks.request(run.parallelism),
            "device": run.execution.device,
            "kernels": run.kernels.backend,
            "deterministic": run.execution.deterministic,
            "log_every": run.execution.log_every,
            "checkpoint": {"every_seconds": run.checkpoint.every_seconds, "rolling": run.checkpoint.keep.rolling},
            "logger": {  # name: what a person reads of the run; its id is the trajectory's
                "kind": run.logger.kind,
                "project": run.logger.project,
                "entity": run.logger.entity,
                "name": f"{name} {label}",
            },
            "divergence": {"margin": run.execution.divergence.margin, "steps": run.execution.divergence.steps},
            "retry_diverged": run.execution.retry_diverged,
            **given,
        },
        flops_per_token=variant.flops_per_token["train"],
        parameters=variant.parameters["total"],
    )


def packings_read(chain: list[Segment]) -> list[str]:
    """The packings that the last segment of a chain reads, in the order of its streams; those behind a replay included."""
    by_id = {segment.id: segment for segment in chain}
    found: list[str] = []

    def read(segment: Segment) -> None:
        for entry in segment.semantic["streams"]:
            if "replay" in entry:
                read(by_id[entry["replay"]])
            elif entry["packing"] not in found:
                found.append(entry["packing"])

    read(chain[-1])
    return found


def ladder(start: int, to: int, step: int) -> set[int]:
    """Token counts of the ladder of kept states: 1, 2, 5 · 10^k steps of a segment, and each 10 % up to its target."""
    found = {round_up(start + (to - start) * tenth // 10, step) for tenth in range(1, 11)}
    power = 1
    while start + power * step < to:
        found |= {start + k * power * step for k in (1, 2, 5) if start + k * power * step < to}
        power *= 10
    return {tokens for tokens in found if start < tokens <= to}


def _add_evals(plan: Plan, variant: Variant) -> None:
    plan.evals[variant.name] = {}
    plan.pretrained_evals[variant.name] = {}
    last = len(variant.chain.segments) - 1
    for one in variant.evals:
        id = short(one.id)
        segment = variant.chain.segments[one.segment]
        if id not in plan.stages:
            plan.stages[id] = _eval_stage(id, one, segment, variant)
        _serve(plan.stages[id], variant)
        is_end = one.segment == last and one.tokens == segment.to
        (plan.evals if is_end else plan.pretrained_evals)[variant.name][one.task] = id


def _eval_stage(id: str, one: EvalStage, segment: Segment, variant: Variant) -> Stage:
    run = variant.run
    at_end = one.segment == len(variant.chain.segments) - 1
    name = variant.row if at_end and variant.run.anneal is not None else f"{variant.arch}@{segment.phase}"
    return Stage(
        id=id,
        kind="eval",
        full_id=one.id,
        semantic=one.semantic,
        parents=[f"{short(segment.id)}@{one.tokens}", *(short(parent) for _, parent in one.parents)],
        phase=segment.phase,
        label=f"{name} {one.task}",
        owner=name,
        request={
            "threads": run.parallelism.threads,
            "device": run.execution.device,
            "kernels": run.kernels.backend,
            "deterministic": run.execution.deterministic,
            "eval": {"batch_size": run.eval.batch_size, **one.request},
        },
        flops_per_token=variant.flops_per_token["forward"],
    )


def _tell_apart(plan: Plan) -> None:
    """Stages of one label get the values of all axes on which the variants that they serve agree: seeds, learning rates."""
    axes = {variant.name: variant.axes for variant in plan.variants}
    arch = {variant.name: variant.arch for variant in plan.variants}
    by_label: dict[str, list[Stage]] = {}
    for stage in plan.stages.values():
        if stage.owner:
            by_label.setdefault(stage.label, []).append(stage)
    for stage in (stage for twins in by_label.values() if len(twins) > 1 for stage in twins):
        served = [axes[name] for name in stage.variants]
        agreed = {key: value for key, value in served[0].items() if all(own.get(key) == value for own in served)}
        owner = name_of(agreed, arch[stage.variants[0]], None)
        if "arm" in served[0] and "arm" not in agreed:  # arms that pretrain alike, of several that do not
            owner += "," + "+".join(sorted({str(own.get("arm")) for own in served}))
        _, at, phase = stage.owner.partition("@")
        owner += at + phase
        stage.label, stage.owner = owner + stage.label.removeprefix(stage.owner), owner
        if stage.kind == "segment":
            stage.request["logger"]["name"] = stage.label


def _serve(stage: Stage, variant: Variant) -> None:
    if variant.name not in stage.variants:
        stage.variants.append(variant.name)


def _parents_first(stages: dict[str, Stage]) -> dict[str, Stage]:
    """Kinds in the order of work, each variant's chain together; parents always before children."""
    ordered: dict[str, Stage] = {}

    def visit(id: str) -> None:
        if id in ordered:
            return
        for parent in stages[id].parents:
            visit(parent)
        ordered[id] = stages[id]

    for kind in ("tokenizer", "corpus", "packing", "tasks", "segment", "eval"):
        for id, stage in stages.items():
            if stage.kind == kind:
                visit(id)
    return ordered


def _mark_cached(stages: dict[str, Stage], store: Store) -> None:
    """A result or state in its place is the only truth about completion."""
    for stage in stages.values():
        kind = "trajectory" if stage.kind == "segment" else stage.kind
        folder = store.folder(kind, stage.full_id)
        if stage.kind == "segment":
            assert stage.to is not None
            stage.cached = folder.state(stage.to) is not None
            stage.weights_only = stage.cached and folder.trainable(stage.to) is None
            earlier = [t for t in folder.states() if (stage.start or 0) < t < stage.to and folder.trainable(t)]
            stage.resume_from = max(earlier) if earlier and (not stage.cached or stage.weights_only) else None
            found = folder.diverged()
            if not stage.cached and found is not None and found["tokens"] <= stage.to:
                stage.diverged = found
        else:
            stage.cached = folder.result is not None
        # A folder without its config is one whose making was cut off; who runs the stage completes it.
        if (folder.path / "config.yaml").is_file():
            found_semantic = folder.semantic()
            if found_semantic != stage.semantic:
                raise ConfigError(
                    f"{folder.path} holds another {kind} than the one planned, under the same id. "
                    "The folder was altered: remove it."
                )


def _mark_needed(plan: Plan) -> None:
    """Pull from the ends: what is asked for and not done is needed, and so are its parents.

    A variant with evaluations asks for them (its state may be gone once it is scored), one without for its end.
    Training goes on from states with an optimizer: a weights-only one is made again for it.
    """

    def need(id: str, with_optimizer: bool = False) -> None:
        stage = plan.stages[id]
        if stage.weights_only and with_optimizer:
            stage.cached, stage.request["optimizer"] = False, True
        if stage.cached or stage.needed:
            return
        stage.needed = True
        for parent in stage.parents:
            if stage.resume_from is None or plan.stages[parent].kind != "segment":
                need(parent, with_optimizer=plan.goes_on(stage, parent))

    for name, segments in plan.segments.items():
        wanted = [*plan.evals[name].values(), *plan.pretrained_evals[name].values()]
        for id in wanted or [segments[-1]]:
            need(id)
