"""Why a stage is not taken from the store: `plan --why`, and the nearest cached stage that plan names by itself."""

from __future__ import annotations

import json

import pytest

from tests.study.test_plan import directory, planned, states  # noqa: F401  # a fixture
from zexp.config.errors import ConfigError
from zexp.store import files
from zexp.store.folder import Store
from zexp.study import catalogue, nearest, record, why
from zexp.study.catalogue import Catalogue
from zexp.study.differ import say
from zexp.study.nearest import Finder
from zexp.study.why import Asked

STUDY = {"name": "first", "question": None}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", patience=0)


def made(directory, store, *variants):  # noqa: F811
    """A study, recorded and finished."""
    plan = planned(directory, *variants, store=store)
    for n, variant in enumerate(plan.variants):
        assert variant.name == f"n={n}"
    states(store, plan, pretrain=True, anneal=True)
    for stage in plan.stages.values():
        if stage.kind == "eval":
            folder = store.folder("eval", stage.full_id)
            folder.create(stage.semantic, {})
            (folder.path / "result").mkdir()
            files.write_manifest(folder.path / "result")
    record.record("first", dict(STUDY), plan, store)
    return plan


def answered(plan, store, a, b=None, composed_first=True):
    found = why.why(Asked(a, b, composed_first), plan, store)
    return found, {(one.leaf, say(one.a), say(one.b)): stages for stages, one in found.differences}


# Two stages


def test_a_difference_that_runs_through_the_chain_is_said_once(directory, store):  # noqa: F811
    made(directory, store, ("anneal=control",))
    plan = planned(directory, ("anneal=control", "optim.weight_decay=0.2"), store=store)
    found, keys = answered(plan, store, "n=0", "first/n=0")
    assert keys == {("optim.weight_decay", "0.2", "0.1"): ["pretrain", "pretrain decay", "anneal"]}
    assert found.shared_tokens == 0 and not found.a.finished and found.b is not None and found.b.finished


def test_a_parents_difference_stands_for_its_ids(directory, store):  # noqa: F811
    made(directory, store, ("anneal=control",))
    plan = planned(directory, ("anneal=control", "corpus.tokenizer.vocab_size=320"), store=store)
    _, keys = answered(plan, store, "n=0", "first/n=0")
    assert keys == {("vocab_size", "320", "300"): ["tokenizer"], ("model.vocab_size", "320", "300"): ["pretrain"]}


def test_two_forks_of_one_state_differ_from_there_on(directory, store):  # noqa: F811
    plan = planned(directory, ("anneal=control",), ("anneal=replay60",), store=store)
    found, keys = answered(plan, store, "n=0", "n=1")
    assert found.shared_tokens == 8192
    assert {stage for stages in keys.values() for stage in stages} == {"anneal"}
    assert ("streams[0].weight", "4,096", "2,458") in keys
    assert not any("parent" in leaf for leaf, _, _ in keys)


def test_a_chain_with_a_segment_more_says_so(directory, store):  # noqa: F811
    plan = planned(directory, ("anneal=none",), ("anneal=control",), store=store)
    found, keys = answered(plan, store, "n=0", "n=1")
    end = plan.segments["n=1"][-1].partition("@")[0]
    assert keys == {("segment", "absent", end): ["anneal"]} and found.shared_tokens == 8192


def test_evaluations_are_explained_by_their_states_and_tasks(directory, store):  # noqa: F811
    plan = planned(directory, ("anneal=none",), ("anneal=none", "optim.clip=0.5", "eval.limit=3"), store=store)
    a, b = (next(iter(plan.evals[name].values())) for name in ("n=0", "n=1"))
    _, keys = answered(plan, store, a, b)
    assert keys == {
        ("optim.clip", "1.0", "0.5"): ["pretrain", "pretrain decay"],
        ("settings.limit", "absent", "3"): [plan.stages[a].label.partition(" ")[2]],
    }


def test_the_same_stage_and_states_of_one_trajectory_are_equal(directory, store):  # noqa: F811
    plan = planned(directory, ("anneal=none",), ("anneal=none", "phases.pretrain.tokens=16K"), store=store)
    trunk, longer = plan.segments["n=0"][0], plan.segments["n=1"][1]
    assert trunk.partition("@")[0] == longer.partition("@")[0] and trunk != longer
    found, keys = answered(plan, store, trunk, longer)
    assert keys == {} and found.to_json()["equal"] and (found.a.tokens, found.b.tokens) == (7168, 14336)


def test_names_are_of_the_composed_study_or_of_the_store(directory, store):  # noqa: F811
    before = made(directory, store, ("anneal=none",))
    plan = planned(directory, ("anneal=none", "optim.clip=0.5"), store=store)
    assert answered(plan, store, "n=0", "first/n=0")[1], "composed first"
    assert answered(plan, store, "n=0", "first/n=0", composed_first=False)[0].to_json()["equal"], "the store first"
    end = before.segments["n=0"][-1]
    assert answered(plan, store, end, "first/n=0")[0].to_json()["equal"]
    label = plan.stages[plan.segments["n=0"][-1]].label
    assert str(answered(plan, store, label, end)[0].a) == plan.segments["n=0"][-1]


def test_what_is_no_stage_or_another_kind_is_refused(directory, store):  # noqa: F811
    plan = planned(directory, ("anneal=none",), ("anneal=none", "seed=1"), store=store)
    tokenizer = next(s.id for s in plan.stages.values() if s.kind == "tokenizer")
    twice = next(s for s in plan.stages.values() if s.kind == "eval")
    for a, b, says in (
        ("nothing", "n=0", "names no variant of the composed study either: n=0, n=1"),
        ("n=0", tokenizer, "name two stages of one kind"),
        (twice.label, "n=0", "names no stage|names 2 stages of the composed study"),
    ):
        if a == twice.label and sum(s.label == twice.label for s in plan.stages.values()) == 1:
            continue
        with pytest.raises(ConfigError, match=says):
            answered(plan, store, a, b)


# One stage


def test_one_name_is_held_against_the_first_stage_that_is_missing(directory, store):  # noqa: F811
    made(directory, store, ("anneal=control",))
    plan = planned(directory, ("anneal=control", "corpus.tokenizer.vocab_size=320"), store=store)
    found, keys = answered(plan, store, "n=0")
    assert found.a.kind == "tokenizer" and keys == {("vocab_size", "320", "300"): ["tokenizer"]}
    plan = planned(directory, ("anneal=control", "anneal.peak_fraction=0.5"), store=store)
    found, keys = answered(plan, store, "n=0")
    assert found.shared_tokens == 8192 and {leaf for leaf, _, _ in keys} == {"lr[0].end", "lr[1].start"}


def test_one_name_against_an_empty_store_has_no_answer(directory, store):  # noqa: F811
    plan = planned(directory, ("anneal=none",), store=store)
    found, keys = answered(plan, store, "n=0")
    assert found.b is None and keys == {} and not found.to_json()["equal"]


# What plan says by itself


def near(plan, store):
    return nearest.nearest(plan, Finder(Catalogue(store)), "first")


def test_plan_names_the_nearest_and_the_keys(directory, store):  # noqa: F811
    before = made(directory, store, ("anneal=control",))
    plan = planned(directory, ("anneal=control", "optim.weight_decay=0.2"), store=store)
    (found,) = near(plan, store)
    root = before.segments["n=0"][0]
    assert found.line() == (
        f"transformer_tiny pretrain is not in the store; nearest: {root} differs in optim.weight_decay (0.2, was 0.1)"
    )
    assert found.to_json() == {
        "stages": [plan.segments["n=0"][0]],
        "nearest": root,
        "differences": [{"key": "optim.weight_decay", "a": 0.2, "b": 0.1}],
    }


def test_a_block_whose_numerics_were_raised_is_named(directory, store, monkeypatch):  # noqa: F811
    from zexp.blocks import table

    made(directory, store, ("anneal=none",))
    spec = table.spec_class("d")
    monkeypatch.setattr(spec, "NUMERICS", {**spec.NUMERICS, "block.mlp": 99})
    (found,) = near(planned(directory, ("anneal=none",), store=store), store)
    assert found.line().endswith("differs in numerics.block.mlp (99, was 1)")


def test_equal_reasons_are_one_line_and_there_are_few(directory, store):  # noqa: F811
    made(directory, store, ("anneal=none",), ("anneal=none", "seed=1"))
    two = [("anneal=none", "optim.clip=0.5"), ("anneal=none", "optim.clip=0.5", "seed=1")]
    (found,) = near(planned(directory, *two, store=store), store)
    assert len(found.stages) == 2 and "and 1 more are not in the store; nearest to the first" in found.line()
    kinds = ["optim.clip=0.5", "optim.eps=1e-7", "optim.weight_decay=0", "schedule.peak_lr=1e-3", "precision=bf16", "optim.betas=[0.9,0.99]"]
    several = near(planned(directory, *(("anneal=none", one) for one in kinds), store=store), store)
    assert len(several) == len(kinds)
    said = nearest.lines(several)
    assert len(said) == nearest.LINES and "2 more stages are near" in said[-1]
    assert len(nearest.lines(several, most=1)) == 1


def test_nothing_is_said_of_what_is_cached_new_or_only_longer(directory, store):  # noqa: F811
    made(directory, store, ("anneal=none",))
    assert near(planned(directory, ("anneal=none",), store=store), store) == []
    longer = planned(directory, ("anneal=none", "phases.pretrain.tokens=16K"), store=store)
    assert longer.to_do and near(longer, store) == [], "it goes on from what is there"
    (store.study("first") / "variants.json").unlink()
    assert near(planned(directory, ("anneal=none", "arch=mamba2_tiny"), store=store), store) == [], "it is another stage"


def test_a_variant_of_the_same_study_is_no_nearest(directory, store):  # noqa: F811
    plan = planned(directory, ("anneal=none",), store=store)
    states(store, plan, pretrain=True)
    both = planned(directory, ("anneal=none",), ("anneal=none", "optim.clip=0.5"), store=store)
    assert [s for s in both.to_do if s.kind == "segment"] and near(both, store) == []


def test_what_stood_in_its_place_is_named_however_much_differs(directory, store):  # noqa: F811
    made(directory, store, ("anneal=none",))
    changes = ("optim.clip=0.5", "optim.eps=1e-7", "optim.weight_decay=0", "optim.betas=[0.9,0.99]")
    plan = planned(directory, ("anneal=none", *changes), store=store)
    (found,) = near(plan, store)
    assert len(found.differences) == 4 and found.line().endswith("and 1 more")
    (store.study("first") / "variants.json").unlink()
    assert near(plan, store) == []


def test_what_is_not_finished_is_no_answer(directory, store):  # noqa: F811
    before = planned(directory, ("anneal=none",), store=store)
    states(store, before)  # the data alone
    root = before.stages[before.segments["n=0"][0]]
    store.folder("trajectory", root.full_id).create(root.semantic, {})
    assert near(planned(directory, ("anneal=none", "optim.clip=0.5"), store=store), store) == []


# The catalogue


def test_the_catalogue_reads_each_config_once(directory, store, monkeypatch):  # noqa: F811
    plan = made(directory, store, ("anneal=control",))
    first = Catalogue(store).of("trajectory")
    assert {known.id for known in first.values()} == {s.full_id for s in plan.stages.values() if s.kind == "segment"}

    def refuse(path):
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(files, "read_yaml", refuse)
    again = Catalogue(store)
    assert again.of("trajectory") == first
    last = plan.stages[plan.segments["n=0"][-1]]
    root = again.root(last.full_id)
    assert root is not None and root["parent"] is None and "model" in root


def test_the_catalogue_reads_a_bounded_number_and_forgets_what_is_gone(directory, store, monkeypatch):  # noqa: F811
    import shutil

    plan = made(directory, store, ("anneal=control",))
    monkeypatch.setattr(catalogue, "READ_AT_MOST", 2)
    assert [len(Catalogue(store).of("trajectory")) for _ in range(3)] == [2, 3, 3]
    gone = store.folder("trajectory", plan.stages[plan.segments["n=0"][-1]].full_id)
    shutil.rmtree(gone.path)
    assert gone.path.name not in Catalogue(store).of("trajectory")
    assert len(json.loads((store.cache / "semantics" / "trajectory.json").read_text())) == 2
    (store.cache / "semantics" / "trajectory.json").write_text("damaged")
    assert len(Catalogue(store).of("trajectory")) == 2


# The command line


@pytest.mark.parametrize(
    ("words", "question", "rest"),
    [
        (["--why", "a,b", "c,d", "seed=1"], Asked("a,b", "c,d", True), ["seed=1"]),
        (["--why", "a,seed=1", "arch=x"], Asked("a,seed=1", None, True), ["arch=x"]),
        (["--json", "--why", "weight_decay=0.1", "s/weight_decay=0.2"], Asked("weight_decay=0.1", "s/weight_decay=0.2", False), ["--json"]),
        (["store=x", "--why", "3f9c@100"], Asked("3f9c@100", None, False), ["store=x"]),
        (["+sweeps=q", "--why", "a", "+phases={b:{tokens:1}}"], Asked("a", None, True), ["+sweeps=q", "+phases={b:{tokens:1}}"]),
        (["--why", "a", "hydra/launcher=local"], Asked("a", None, False), ["hydra/launcher=local"]),
        (["-m"], None, ["-m"]),
    ],
)
def test_why_takes_one_or_two_names_from_the_words(words, question, rest):
    assert why.asked(words) == (question, rest)


@pytest.mark.parametrize("words", [["--why"], ["--why", "seed=1"], ["--why", "-m"]])
def test_why_without_a_name_is_refused(words):
    with pytest.raises(ConfigError, match="--why needs one or two stages"):
        why.asked(words)
