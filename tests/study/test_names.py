"""What RUN may be: a variant, STUDY/VARIANT, the beginning of an id, a folder; several candidates are listed."""

from __future__ import annotations

import pytest

from zexp.config.errors import ConfigError
from zexp.store import files
from zexp.store.folder import Store
from zexp.store.ids import semantic_id, short
from zexp.study import names


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", patience=0)


def trajectory(store, number, *tokens):
    semantic = {"parent": None, "number": number}
    folder = store.folder("trajectory", semantic_id(semantic))
    folder.create(semantic, {})
    for count in tokens:
        state = folder.path / "states" / str(count)
        state.mkdir(parents=True)
        files.write_manifest(state)
    return folder


def study(store, name, variants, pretrained=()):
    rows = [
        [
            {"name": key, "row": key.split(",seed")[0], "segments": [f"{short(folder.id)}@{tokens}"]}
            for key, folder, tokens in part
        ]
        for part in (variants, pretrained)
    ]
    store.study(name).mkdir(parents=True)
    files.write_json(store.study(name) / "variants.json", {"variants": rows[0], "pretrained": rows[1]})


@pytest.fixture
def one(store):
    return trajectory(store, 1, 100, 200)


@pytest.fixture
def two(store):
    return trajectory(store, 2, 50)


def test_a_state_by_every_name_that_it_has(store, one, two):
    study(store, "first", [("tiny,replay60,seed=0", one, 200)], [("tiny@pretrain", two, 50)])
    for said, folder, tokens in (
        ("tiny,replay60,seed=0", one, 200),
        ("tiny,replay60", one, 200),
        ("first/tiny,replay60", one, 200),
        ("tiny@pretrain", two, 50),
        ("first/tiny@pretrain", two, 50),
        (short(one.id), one, 200),
        (one.id[:6], one, 200),
        (f"{one.id[:6]}@100", one, 100),
        (str(one.path), one, 200),
        (str(one.path / "states" / "100"), one, 100),
    ):
        assert names.state(store, said) == names.State(folder, tokens), said
    assert names.stage(store, "first/tiny@pretrain") == names.stage(store, two.id[:8]) == two


def test_one_state_of_several_studies_is_one(store, one):
    study(store, "first", [("tiny", one, 200)])
    study(store, "second", [("tiny", one, 200)])
    assert names.state(store, "tiny") == names.State(one, 200)


def test_candidates_are_listed(store, one, two):
    study(store, "first", [("tiny,seed=0", one, 200), ("tiny,seed=1", two, 50)])
    study(store, "second", [("small", one, 200)])
    study(store, "third", [("small", two, 50)])
    like = next(made for number in range(3, 100) if (made := trajectory(store, number)).id[0] == one.id[0])
    for said, says in (
        ("tiny", ["names 2 variants: first/tiny,seed=0, first/tiny,seed=1"]),
        ("first/tiny", ["names 2 variants of first. It could be: tiny,seed=0, tiny,seed=1"]),
        ("first/big", ["names 0 variants of first. There are: tiny,seed=0, tiny,seed=1"]),
        ("small", ["second/small, third/small"]),
        (like.id[0], ["stages: ", str(like), str(one), "Give more digits."]),
    ):
        with pytest.raises(ConfigError) as caught:
            names.state(store, said)
        assert [text for text in says if text not in str(caught.value)] == [], str(caught.value)


def test_a_state_that_is_not_there_lists_those_that_are(store, one, two):
    study(store, "first", [("tiny", one, 300)])
    empty = trajectory(store, 3)
    for said, says in (
        ("tiny", "has no state at 300 tokens. It has states at 100, 200 tokens. `zexp run` trains what is missing."),
        (f"{two.id[:6]}@51", "has no state at 51 tokens. It has states at 50 tokens."),
        (short(empty.id), "It has no state yet."),
        ("nothing", "'nothing' names no stage of"),
        ("tiny@end", "'end' behind the @ is no number"),
    ):
        with pytest.raises(ConfigError) as caught:
            names.state(store, said)
        assert says in str(caught.value)


def test_what_is_no_model_is_refused(store):
    semantic = {"kind": "bpe"}
    folder = store.folder("tokenizer", semantic_id(semantic))
    folder.create(semantic, {})
    with pytest.raises(ConfigError, match="which is no model"):
        names.state(store, short(folder.id))
