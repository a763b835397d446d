"""In which keys semantic blocks differ; the nearest of many is what comparing one by one finds."""

from __future__ import annotations

import random

from hypothesis import given, strategies

from zexp.study.differ import ABSENT, Blocks, Difference, differences, leaves, say

A = {
    "optim": {"betas": [0.9, 0.95], "weight_decay": 0.1},
    "lr": [{"from": 0, "end": 1.0}, {"from": 10, "end": 0.0}],
    "parent": None,
    "model": {"pattern": ["a", "d"], "norm": {}},
}


def changed(**keys):
    return {**A, **keys}


def test_a_list_of_values_is_one_leaf_and_one_of_tables_has_a_leaf_each():
    b = changed(
        optim={"betas": [0.9, 0.99], "weight_decay": 0.1},
        lr=[{"from": 0, "end": 2.0}, {"from": 10, "end": 0.0}],
        parent={"id": "x"},
    )
    assert differences(A, b) == [
        Difference("optim.betas", [0.9, 0.95], [0.9, 0.99]),
        Difference("lr[0].end", 1.0, 2.0),
        Difference("parent", None, ABSENT),
        Difference("parent.id", ABSENT, "x"),
    ]
    assert differences(A, A) == []


def test_what_an_id_tells_apart_is_told_apart():
    assert [one.leaf for one in differences({"x": 1, "y": True, "z": None}, {"x": 1.0, "y": 1, "z": "None"})] == ["x", "y", "z"]


def test_an_absent_side_is_left_out_of_the_json():
    assert Difference("k", ABSENT, None).to_json() == {"key": "k", "b": None}


def test_values_are_said_for_people():
    said = [say(value) for value in (ABSENT, None, True, 1_000_000, 0.5, ["m", 2], "ab" * 32, "ab")]
    assert said == ["absent", "null", "true", "1,000,000", "0.5", "[m, 2]", "abababababababab…", "ab"]


small = strategies.dictionaries(
    strategies.sampled_from("abcdef"),
    strategies.one_of(strategies.integers(0, 1), strategies.lists(strategies.fixed_dictionaries({"x": strategies.integers(0, 1)}), max_size=2)),
)


@given(block=small, others=strategies.lists(small, max_size=40), most=strategies.integers(0, 4))
def test_the_nearest_are_those_that_differ_in_fewest_keys(block, others, most):
    blocks = {f"b{n}": other for n, other in enumerate(others)}
    count = {name: len({one.key for one in differences(block, other)}) for name, other in blocks.items()}
    found = list(Blocks.of(blocks).near(leaves(block), most))
    assert sorted(found) == sorted(name for name, keys in count.items() if keys <= most)
    assert [count[name] for name in found] == sorted(count[name] for name in found)


def test_anchored_keys_are_the_same_and_what_is_left_out_is_left_out():
    draw = random.Random(0)
    blocks = {f"b{n}": {key: draw.randrange(2) for key in "abc"} for n in range(50)}
    made, block = Blocks.of(blocks), {"a": 0, "b": 0, "c": 0}
    without = {"b1", "b2", "b3"}
    found = set(made.near(block, 3, anchors=["a"], without=made.set_of(without)))
    assert found == {name for name, other in blocks.items() if other["a"] == 0 and name not in without}
    assert list(made.near({"d": 1}, 3, anchors=["d"])) == [], "an anchor that the others lack is another parent"
