"""Phases to segments: what is shared, what is cut where, and which key enters which id."""

import pytest

from tests.composed import run
from zexp.config.errors import ConfigError
from zexp.train.phases import Chain, compile_chain


def chain(*overrides: str, numerics: dict[str, int] | None = None) -> Chain:
    own = [] if any(text.startswith("schedule.peak_lr=") for text in overrides) else ["schedule.peak_lr=3e-3"]
    return compile_chain(
        run(*overrides, *own),
        model={"pattern": ["a", "d"], "width": 128},
        model_numerics=numerics or {"block.attention": 1},
        tokenizer="7" * 64,
        packing=lambda name, source: f"{name}-packing",
    )


def ids(*overrides: str, numerics: dict[str, int] | None = None) -> list[str]:
    return [segment.id for segment in chain(*overrides, numerics=numerics).segments]


def test_the_example_of_the_quickstart_is_cut_as_documented():
    found = chain("anneal=replay60")
    assert [(s.start, s.to) for s in found.segments] == [(0, 516_096), (516_096, 577_536), (577_536, 675_840)]
    anneal = found.segments[-1].semantic
    assert anneal["lr"] == [
        {"from": 577_536, "to": 589_824, "shape": "linear", "start": 0.0, "end": 0.00225},
        {"from": 589_824, "to": 675_840, "shape": "linear", "start": 0.00225, "end": 0.0},
    ]
    assert anneal["streams"] == [
        {"replay": found.segments[1].id, "start": "continue", "weight": 2458},
        {"packing": "high_quality-packing", "seed": 0, "weight": 1638},
    ]


def test_a_longer_wsd_extends_the_trunk_of_a_shorter_one():
    short, long = chain("anneal=none"), chain("anneal=none", "phases.pretrain.tokens=1152K")
    assert short.segments[0].id == long.segments[0].id
    assert short.segments[0].to < long.segments[0].to
    assert short.segments[1].id != long.segments[1].id


def test_a_constant_rate_is_the_trunk_of_wsd():
    assert ids("anneal=none", "schedule=constant")[0] == ids("anneal=none")[0]


def test_a_cosine_shares_nothing_with_a_longer_one():
    assert ids("anneal=none", "schedule=cosine") != ids("anneal=none", "schedule=cosine", "phases.pretrain.tokens=1152K")


def test_a_phase_that_only_goes_on_is_merged_into_its_parent():
    longer = chain("anneal=none", "schedule=constant", "phases.pretrain.tokens=80K")
    more = (
        "+phases={more: {parent: pretrain, tokens: 40K, "
        "schedule: {kind: constant, peak_lr: 0.003, warmup_tokens: 0}}}"
    )
    merged = chain("anneal=none", "schedule=constant", "phases.pretrain.tokens=40960", more)
    assert [s.id for s in merged.segments] == [s.id for s in longer.segments]
    assert merged.segments[0].to == longer.segments[0].to == 81_920


def test_full_replay_is_continuing():
    found = chain("anneal=control").segments[-1]
    assert found.semantic["streams"] == [{"replay": found.semantic["parent"]["id"], "start": "continue", "weight": 4096}]
    same_mix = ids("anneal=replay60", "anneal.replay.fraction=0", "anneal.mix=null")
    assert same_mix == ids("anneal=control")


def test_arms_share_the_pretraining_and_nothing_more():
    control, replay = ids("anneal=control"), ids("anneal=replay60")
    assert control[:2] == replay[:2]
    assert control[2] != replay[2]


@pytest.mark.parametrize(
    "override",
    [
        "execution.micro_batch=4",
        "execution.log_every=3",
        "parallelism.threads=2",
        "kernels=torch",
        "checkpoint.every_seconds=1",
        "checkpoint.keep.ladder=true",
        "logger=wandb",
        "store=elsewhere",
        "eval.batch_size=3",
    ],
)
def test_execution_keys_leave_every_id_as_it_was(override):
    assert ids(override) == ids()


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("seed=1", [0, 1, 2]),
        ("seeds.init=1", [0, 1, 2]),
        ("schedule.peak_lr=1e-3", [0, 1, 2]),
        ("precision=bf16", [0, 1, 2]),
        ("optim.weight_decay=0.0", [0, 1, 2]),
        ("seq_len=128", [0, 1, 2]),
        ("corpus.packing.document_mask=false", [0, 1, 2]),
        ("phases.pretrain.batch_tokens=8192", [0, 1, 2]),
        ("schedule.decay_shape=cosine", [1, 2]),
        ("schedule.decay=20%", [1, 2]),
        ("anneal.peak_fraction=0.5", [2]),
        ("anneal.shape=cosine", [2]),
        ("anneal.optimizer_state=reset", [2]),
        ("anneal.replay.fraction=0.5", [2]),
        ("anneal.replay.start=beginning", [2]),
        ("anneal.seed=1", [2]),
    ],
)
def test_a_semantic_key_changes_exactly_the_segments_that_read_it(override, changed):
    before, after = ids("anneal=replay60"), ids("anneal=replay60", override)
    assert [i for i in range(3) if before[i] != after[i]] == changed


def test_a_seed_that_orders_nothing_new_collapses():
    assert ids("anneal=control", "anneal.seed=1") == ids("anneal=control")


def test_a_blocks_numerics_change_the_root_and_with_it_everything_after():
    assert all(a != b for a, b in zip(ids(), ids(numerics={"block.attention": 2}), strict=True))


def test_the_ids_of_a_chain_are_pinned():
    # A change here orphans every stored result: raise the `numerics` of what changed and say so in CHANGELOG.
    assert [id[:8] for id in ids("anneal=replay60")] == PINNED


PINNED = ["20003c36", "431a4b63", "1b8ab59b"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["phases.pretrain.batch_tokens=1000"], "not a multiple of seq_len = 256"),
        (["anneal.parent=cool"], "names no phase"),
        (["anneal.warmup_tokens=96K"], "leaves nothing of the anneal"),
        (["anneal.replay.fraction=1.5"], "not between 0 and 1"),
        (["anneal.shape=steps"], "it is one of"),
        (["schedule.decay=99%"], "do not fit into the phase"),
        (["schedule=cosine", "schedule.decay=10%"], "is not read by kind: cosine"),
        (["mix.sources.base.weight=-1"], "must be a finite number, 0 or above"),
        (["mix.sources.base.weight=0"], "every weight is 0"),
        (["precision=fp8"], "it is fp32 or bf16"),
        (["phases.pretrain.tokens=0"], "trains nothing"),
        (["phases.pretrain.tokens=ten"], "is no token count"),
        (["phases.pretrain.tokens=10%"], "has no parent"),
        (["optim.kind=sgd"], "it is one of adamw"),
    ],
)
def test_bad_phases_are_refused_with_what_to_do(overrides, says):
    with pytest.raises(ConfigError, match=says):
        chain("anneal=replay60", *overrides)


def test_two_children_of_one_phase_are_no_chain():
    more = "+phases={more: {parent: pretrain, tokens: 40K}}"
    with pytest.raises(ConfigError, match="One variant is one chain"):
        chain(more)


def test_a_wsd_that_decays_as_soon_as_it_is_warm_still_has_a_trunk_to_extend():
    short = chain("anneal=none", "phases.pretrain.tokens=40960", "schedule.warmup_tokens=20480", "schedule.decay=20480")
    longer = chain("anneal=none", "phases.pretrain.tokens=81920", "schedule.warmup_tokens=20480", "schedule.decay=20480")
    assert short.segments[0].id == longer.segments[0].id
    assert [(s.start, s.to) for s in short.segments] == [(0, 20480), (20480, 40960)]


def test_a_wsd_that_is_all_decay_is_one_segment():
    whole = chain("anneal=none", "schedule.warmup_tokens=0", "schedule.decay=100%")
    assert [piece["shape"] for piece in whole.segments[0].semantic["lr"]] == ["linear"]
    assert len(whole.segments) == 1
