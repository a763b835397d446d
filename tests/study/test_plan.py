"""The tree of stages: what is shared, which keys enter which ids, what the store answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import composed
from zexp.blocks import table
from zexp.store.folder import Store
from zexp.study import plan as plans
from zexp.study.resolve import Composed, Resolver

TEXTS = "".join(f"Paragraph {n} says that {n} and {n + 1} make {2 * n + 1}.\n\n" for n in range(400))
SMALL = (
    "corpus.sources={base:{kind:text,view:null,files:a.txt,documents:paragraph},"
    "high_quality:{kind:text,view:null,files:b.txt,documents:paragraph}}",
    "corpus.tokenizer.vocab_size=300", "seq_len=64", "phases.pretrain.tokens=8K", "phases.pretrain.batch_tokens=512",
    "schedule.warmup_tokens=1K", "anneal.tokens=2K", "anneal.warmup_tokens=512", "eval=bpb",
    "mix.sources.base.max_epochs=null",
)  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(TEXTS)
    (folder / "b.txt").write_text(TEXTS.replace("says", "holds"))
    return folder


def planned(directory: Path, *variants: tuple[str, ...], store: Store | None = None) -> plans.Plan:
    """The plan of variants, each a list of overrides beyond SMALL."""
    made = []
    for n, overrides in enumerate(variants):
        anneal = next((o.split("=")[1] for o in overrides if o.startswith("anneal=")), "replay60")
        words = [f"anneal={anneal}"] + [o for o in overrides if not o.startswith("anneal=")]
        small = [o for o in SMALL if anneal != "none" or not o.startswith("anneal.")]
        mixed = ["anneal.mix.sources.high_quality.max_epochs=null"] if anneal == "replay60" else []
        config = composed.config(*words[:1], *small, *mixed, *words[1:])
        made.append(Composed(config, {"arch": "transformer_tiny", "anneal": anneal}, {"n": n}, list(overrides)))
    store = store or Store(directory / "store")
    return plans.build(Resolver(store.root, directory).variants(made), store)


def ids(plan: plans.Plan) -> set[str]:
    return set(plan.stages)


def of_kind(plan: plans.Plan, kind: str, phase: str | None = None) -> set[str]:
    return {s.id for s in plan.stages.values() if s.kind == kind and (phase is None or s.phase == phase)}


def test_variants_share_what_they_agree_on(directory):
    plan = planned(directory, ("anneal=control",), ("anneal=replay60",), ("anneal=none",))
    assert len(of_kind(plan, "segment", "pretrain")) == 2, "a trunk and its decay, once"
    assert len(of_kind(plan, "segment", "anneal")) == 2
    tokens = plan.tokens()
    assert tokens["unshared"] == 3 * 8192 + 2 * 2048
    assert tokens["shared"] == tokens["to_train"] == 8192 + 2 * 2048


EXECUTION = [
    "execution.micro_batch=1", "execution.log_every=1", "execution.device=cpu", "execution.deterministic=false",
    "parallelism.threads=2", "kernels=torch", "logger=wandb", "eval.batch_size=3", "checkpoint.every_seconds=1",
    "checkpoint.keep.rolling=1", "checkpoint.keep.ends=all", "study.name=other", "execution.retry_diverged=true",
    "mix.sources.base.max_epochs=1000",
]  # fmt: skip


@pytest.mark.parametrize("override", EXECUTION)
def test_what_is_execution_changes_no_stage_id(directory, override):
    assert ids(planned(directory, (override,))) == ids(planned(directory, ()))


DATA, ROOT, FORK = {"tokenizer", "corpus", "packing", "tasks"}, "pretrain", "anneal"


@pytest.mark.parametrize(
    ("override", "stays"),
    [
        ("seed=1", DATA),
        ("seeds.init=1", DATA),
        ("phases.pretrain.seed=1", DATA),
        ("anneal.seed=1", DATA | {ROOT}),
        ("schedule.peak_lr=1e-3", DATA),
        ("anneal.peak_fraction=0.5", DATA | {ROOT}),
        ("anneal.optimizer_state=reset", DATA | {ROOT}),
        ("+mix.sources={high_quality:{weight:1,max_epochs:null}}", DATA),
        ("anneal.replay.fraction=0.5", DATA | {ROOT}),
        ("precision=bf16", DATA),
        ("optim.weight_decay=0.2", DATA),
        ("phases.pretrain.batch_tokens=1024", DATA),
        ("corpus.packing.document_mask=false", DATA - {"packing"}),
        ("seq_len=128", {"tokenizer", "corpus", "tasks"}),
        ("corpus.tokenizer.vocab_size=320", set()),
    ],
)
def test_what_is_semantic_changes_exactly_what_depends_on_it(directory, override, stays):
    before, after = planned(directory, ()), planned(directory, (override,))
    for kind in DATA:
        same = of_kind(before, kind) == of_kind(after, kind)
        # The mask is no part of a packing's folder: only what reads it changes.
        assert same == (kind in stays or override == "corpus.packing.document_mask=false"), kind
    for phase in (ROOT, FORK):
        assert (of_kind(before, "segment", phase) == of_kind(after, "segment", phase)) == (phase in stays), phase
        shared = of_kind(before, "eval", phase) & of_kind(after, "eval", phase)
        assert bool(shared) == (phase in stays), f"a score of {phase} belongs to its state"


def test_a_blocks_numerics_change_the_ids_of_what_uses_it(directory, monkeypatch):
    before = {arch: ids(planned(directory, (f"arch={arch}",))) for arch in ("transformer_tiny", "mamba2_tiny", "zamba2_tiny")}
    spec = table.spec_class("m")
    monkeypatch.setattr(spec, "NUMERICS", {**spec.NUMERICS, "block.mamba2": 99})
    after = {arch: ids(planned(directory, (f"arch={arch}",))) for arch in before}
    assert after["transformer_tiny"] == before["transformer_tiny"]
    for arch in ("mamba2_tiny", "zamba2_tiny"):
        assert not {id for id in after[arch] if "@" in id} & before[arch], "every segment is another"
        assert {id for id in after[arch] if "@" not in id} & before[arch], "the data is the same"


def test_a_longer_run_extends_the_trunk(directory):
    plan = planned(directory, ("anneal=none",), ("anneal=none", "phases.pretrain.tokens=16K"))
    trunks = [s for s in plan.stages.values() if s.kind == "segment" and s.semantic["parent"] is None]
    assert len({s.full_id for s in trunks}) == 1
    assert [(s.start, s.to) for s in sorted(trunks, key=lambda s: s.to or 0)] == [(0, 7168), (7168, 14336)]


def states(store: Store, plan: plans.Plan, **trainable: bool) -> None:
    """Put every segment's state into the store, with or without its optimizer, and every data stage's result."""
    for stage in plan.stages.values():
        kind = "trajectory" if stage.kind == "segment" else stage.kind
        folder = store.folder(kind, stage.full_id)
        if stage.kind == "eval" or (stage.kind == "segment" and stage.phase not in trainable):
            continue
        folder.create(stage.semantic, {})
        place = folder.path / (f"states/{stage.to}" if stage.kind == "segment" else "result")
        (place / "weights").mkdir(parents=True)
        (place / "manifest.json").write_text('{"files": {}, "bins": 100000}')
        if stage.kind == "segment" and (trainable[stage.phase or ""] or stage.label.endswith("pretrain")):
            (place / "optimizer").mkdir()


def needed(plan: plans.Plan) -> set[Any]:
    return {(s.label.split()[-1], s.to) for s in plan.to_do if s.kind == "segment"}


def test_a_fork_of_a_weights_only_state_trains_it_again_from_the_trunk(directory, tmp_path):
    store = Store(tmp_path / "store")
    states(store, planned(directory, ("anneal=none",), store=store), pretrain=False)
    assert needed(planned(directory, ("anneal=none",), store=store)) == set()
    assert planned(directory, ("anneal=none",), store=store).tokens()["to_train"] == 0
    again = planned(directory, ("anneal=control",), store=store)
    assert needed(again) == {("decay", 8192), ("anneal", 10240)}
    assert again.tokens()["to_train"] == 1024 + 2048
    decay = next(s for s in again.stages.values() if s.label.endswith("decay"))
    assert decay.request["optimizer"] and not decay.cached
    reset = planned(directory, ("anneal=control", "anneal.optimizer_state=reset"), store=store)
    assert needed(reset) == {("anneal", 10240)}, "weights are all that it reads"


def test_a_killed_segment_resumes_from_its_newest_state_with_an_optimizer(directory, tmp_path):
    store = Store(tmp_path / "store")
    plan = planned(directory, ("anneal=none",), store=store)
    states(store, plan)  # the data alone
    trunk = next(s for s in plan.stages.values() if s.kind == "segment" and s.semantic["parent"] is None)
    folder = store.folder("trajectory", trunk.full_id)
    folder.create(trunk.semantic, {})
    for tokens, parts in ((2048, ("weights", "optimizer")), (4096, ("weights",))):
        for part in parts:
            (folder.path / "states" / str(tokens) / part).mkdir(parents=True)
        (folder.path / "states" / str(tokens) / "manifest.json").write_text('{"files": {}}')
    again = planned(directory, ("anneal=none",), store=store)
    assert again.stages[trunk.id].resume_from == 2048
    assert again.tokens()["to_train"] == 8192 - 2048


def test_a_folder_that_was_altered_is_refused(directory, tmp_path):
    store = Store(tmp_path / "store")
    plan = planned(directory, (), store=store)
    stage = next(s for s in plan.stages.values() if s.kind == "tokenizer")
    folder = store.folder("tokenizer", stage.full_id)
    folder.create(stage.semantic, {})
    config = folder.path / "config.yaml"
    config.write_text(config.read_text().replace("vocab_size: 300", "vocab_size: 301"))
    with pytest.raises(ValueError, match=r"The folder was altered: remove it"):
        planned(directory, (), store=store)


def test_the_packings_that_a_segment_reads_are_its_parents_whoever_is_listed_first(directory):
    for order in (("anneal=control",), ("anneal=replay60",)), (("anneal=replay60",), ("anneal=control",)):
        plan = planned(directory, *order)
        read = {
            s.label: sorted(plan.stages[p].label for p in s.parents if plan.stages[p].kind != "segment")
            for s in plan.stages.values()
            if s.kind == "segment"
        }
        pure, mixed = ["packing base"], ["packing base", "packing high_quality"]
        assert sorted(read.values()) == sorted([[*pure, "tokenizer"], pure, pure, mixed])


def test_a_folder_whose_making_was_cut_off_counts_as_absent(directory, tmp_path):
    store = Store(tmp_path / "store")
    plan = planned(directory, (), store=store)
    stage = next(s for s in plan.stages.values() if s.kind == "tokenizer")
    folder = store.folder("tokenizer", stage.full_id)
    folder.path.mkdir(parents=True)
    (folder.path / "provenance.json").write_text("{}")
    assert not planned(directory, (), store=store).stages[stage.id].cached
    folder.create(stage.semantic, {})
    assert folder.semantic() == stage.semantic


def test_the_optimizer_of_an_open_end_is_never_dropped(directory):
    plan = planned(directory, ("anneal=none", "schedule=constant", "schedule.warmup_tokens=0"))
    assert plan.scored_ends() == [], "a longer run goes on from there"
    assert len(planned(directory, ("anneal=none",)).scored_ends()) == 1


def test_the_end_of_a_pretraining_in_one_segment_stays_whole(directory):
    plan = planned(directory, ("anneal=none", "schedule=cosine", "schedule.warmup_tokens=1K"))
    assert plan.scored_ends() == [], "a fork of it would train from the beginning"


def test_pretrainings_whose_arms_differ_have_labels_of_their_own(directory):
    plan = planned(directory, *((f"schedule.peak_lr={rate}", f"anneal.peak_fraction={part}") for rate in (1e-3, 2e-3) for part in (0.5, 0.75)))
    for n, variant in enumerate(plan.variants):
        variant.axes = {"arm": "abcd"[n]}
    for stage in plan.stages.values():
        if stage.owner:
            stage.label = stage.label.replace(stage.owner, "x")
            stage.owner = "x"
    plans._tell_apart(plan)
    labels = [s.label for s in plan.stages.values() if s.kind == "segment" and s.phase == "pretrain"]
    assert len(set(labels)) == len(labels) == 4 and any("a+b pretrain" in label for label in labels)
