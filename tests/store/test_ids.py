import enum
import json
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zexp.store.ids import canonical_json, round12, semantic_id, short

TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # every Unicode character but surrogates
FLOATS = st.floats(allow_nan=False, allow_infinity=False).map(round12)
LEAVES = st.none() | st.booleans() | st.integers() | FLOATS | TEXT
# Values that other serialisers take for one another.
TWINS = st.sampled_from([0, 0.0, False, None, "", "0", "null", "false", 1, 1.0, True, "1", "1.0", "é", "e\u0301"])


def trees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(leaves, lambda x: st.lists(x, max_size=4) | st.dictionaries(TEXT, x, max_size=4), max_leaves=9)


def typed(obj: Any) -> Any:
    """obj with every type spelt out, so that == tells 1, 1.0 and True apart."""
    if isinstance(obj, dict):
        return {key: typed(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [typed(value) for value in obj]
    return type(obj).__name__, obj


@given(trees(LEAVES))
def test_canonical_json_is_json_and_reads_back_with_its_types(obj):
    text = canonical_json(obj)
    assert text.isascii()
    assert typed(json.loads(text)) == typed(obj)


@given(trees(TWINS), trees(TWINS))
def test_two_configs_share_a_text_only_if_they_are_the_same(a, b):
    assert (canonical_json(a) == canonical_json(b)) == (typed(a) == typed(b))


@given(st.dictionaries(TEXT, LEAVES, min_size=2), st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(obj, random):
    keys = list(obj)
    random.shuffle(keys)
    assert canonical_json({key: obj[key] for key in keys}) == canonical_json(obj)


def test_the_order_of_a_list_matters_and_a_tuple_is_a_list():
    assert canonical_json(["a", "m"]) != canonical_json(["m", "a"])
    assert canonical_json(("a", "m")) == canonical_json(["a", "m"])


def test_an_int_a_float_and_a_bool_of_the_same_value_differ():
    assert len({semantic_id({"x": x}) for x in (1, 1.0, True, "1")}) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.0])
def test_numbers_without_one_meaning_are_refused_by_their_path(bad):
    with pytest.raises(ValueError, match=r"lr\[1\]\.start: "):
        canonical_json({"lr": [{"start": 0.0}, {"start": bad}]})


def test_an_unrounded_float_is_refused_and_its_rounding_is_not():
    with pytest.raises(ValueError, match=r"optim\.lr: .* more than 12 significant digits"):
        canonical_json({"optim": {"lr": 0.1 + 0.2}})
    assert canonical_json(round12(0.1 + 0.2)) == "0.3"


class Colour(enum.IntEnum):
    RED = 1


class Name(str):
    pass


@pytest.mark.parametrize(
    "bad", [np.float64(1.0), np.int64(1), Colour.RED, Name("a"), {1}, b"a", 1j, object(), OrderedDict(), range(2)]
)
def test_an_unknown_type_is_refused_by_its_path(bad):
    with pytest.raises(TypeError, match=r"model\.blocks\.m: "):
        canonical_json({"model": {"blocks": {"m": bad}}})


@pytest.mark.parametrize("key", [1, None, True, Name("a"), ("a",)])
def test_a_key_that_is_no_plain_string_is_refused(key):
    with pytest.raises(TypeError, match="streams: key "):
        canonical_json({"streams": {key: 1}})


def test_a_lone_surrogate_is_refused_because_a_pair_would_be_written_like_its_character():
    assert json.dumps("\U0001f600") == json.dumps("\ud83d\ude00")  # the collision
    for text in ("\ud83d\ude00", "\udcff"):
        with pytest.raises(ValueError, match=r"name: .*surrogate"):
            canonical_json({"name": text})


def test_texts_that_only_look_the_same_stay_apart():
    assert canonical_json("é") != canonical_json("e\u0301")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_rounding_is_idempotent_close_and_always_accepted(x):
    rounded = round12(x)
    assert round12(rounded) == rounded
    # Half a unit of the 12th digit; the smallest floats (subnormals) have fewer digits than that themselves.
    assert abs(rounded - x) <= 5e-12 * abs(x) + 5e-324
    canonical_json(rounded)


def test_rounding_refuses_what_cannot_be_rounded_and_drops_the_sign_of_zero():
    assert math.copysign(1.0, round12(-0.0)) == 1.0
    with pytest.raises(ValueError):
        round12(math.nan)


def test_the_text_and_the_id_of_a_semantic_block_are_pinned():
    # A change here orphans every stored result of every user: say so in CHANGELOG.
    semantic = {
        "parent": {"id": "0" * 64, "tokens": 577536},
        "lr": [{"from": 577536, "to": None, "shape": "linear", "start": 0.0, "end": 0.00225}],
        "optim": {"kind": "adamw", "betas": (0.9, 0.95), "eps": 1e-08, "clip": 1.0, "big": 1e16},
        "document_mask": True,
        "näme": 'a"b\\c\n\u2028😀',
        "empty": [{}, [], ""],
    }
    assert canonical_json(semantic) == (
        '{"document_mask":true,"empty":[{},[],""],'
        '"lr":[{"end":0.00225,"from":577536,"shape":"linear","start":0.0,"to":null}],'
        '"n\\u00e4me":"a\\"b\\\\c\\n\\u2028\\ud83d\\ude00",'
        '"optim":{"betas":[0.9,0.95],"big":1e+16,"clip":1.0,"eps":1e-08,"kind":"adamw"},'
        '"parent":{"id":"0000000000000000000000000000000000000000000000000000000000000000","tokens":577536}}'
    )
    assert semantic_id(semantic) == "189702036724ab867f6f136e6bd7a33e37da56c6746e0094ee69dcb8148f63dc"
    assert semantic_id({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_a_semantic_block_is_a_dict():
    with pytest.raises(TypeError):
        semantic_id([1])  # type: ignore[arg-type]


def test_a_short_id_is_its_first_sixteen_digits_and_nothing_else_is_an_id():
    assert short("0123456789abcdef" * 4) == "0123456789abcdef"
    for bad in ("abc", "G" * 64, "A" * 64, "0" * 63, "../" + "0" * 61):
        with pytest.raises(ValueError, match="is not an id"):
            short(bad)
