"""The layer string and what is said when it makes no sense."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zexp.blocks.pattern import branches, expand, feeder, letters
from zexp.config.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("4*(a d)", ["a", "d"] * 4),
        ("2*(5*m gm) 2*m", (["m"] * 5 + ["gm"]) * 2 + ["m"] * 2),
        ("m gm m gm", ["m", "gm", "m", "gm"]),
        ("2*((a|m) d)", ["(a|m)", "d"] * 2),
        ("( a | m )", ["(a|m)"]),
        ("g(a|m) d", ["g(a|m)", "d"]),
        ("3*gm", ["gm"] * 3),
        ("2 * 2*(a d)", ["a", "d"] * 4),
        ("a (d)", ["a", "d"]),
        ("M*-M", ["m", "a", "d", "m"]),
        ("ME-", ["m", "e", "d"]),
        (["m", "2*gm"], ["m", "gm", "gm"]),
    ],
)
def test_a_pattern_expands_to_its_layers(text, layers):
    assert expand(text) == layers


def test_the_8b_hybrid_in_megatrons_letters_has_its_56_layers():
    # arXiv:2406.07887, section 3.3
    layers = expand("M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-")
    assert [layers.count(letter) for letter in "mad"] == [24, 4, 28]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "6*m 6*(gm 5*m",
            "arch.pattern = '6*m 6*(gm 5*m': the '(' at character 7 is never closed.\n  Close it: '6*m 6*(gm 5*m)'.",
        ),
        ("a d)", "the ')' at character 4 closes nothing."),
        ("3*", "a letter or '(' is expected at character 3, found the end."),
        ("a 2 d", "the number 2 at character 3 repeats nothing."),
        ("0*a", "the repeat 0* at character 1 leaves no layer."),
        ("a ()", "the group at character 3 is empty."),
        ("a | m", "a letter or '(' is expected at character 3, found '|'."),
        ("(a|md)", "the branch 'md' at character 4 is not one block letter."),
        ("(a|m", "the '(' at character 1 is never closed."),
        ("gmm", "'gmm' at character 1 are 3 letters in one layer"),
        ("d (a d)x", None),
        ("a(m d)", "the '(' at character 2 follows a letter"),
        ("M*-m", "'M' at character 1 is not a layer: block letters are a to z."),
        ("9999999*m", "at character 1 the model passes 10000 layers."),
        ("101*(100*m)", "at character 5 the model passes 10000 layers."),
        ("  ", "the pattern is empty"),
        ([], "a model needs at least one layer"),
        (7, "a pattern is a string or a list of strings"),
    ],
)
def test_a_wrong_pattern_names_the_character(text, message):
    if message is None:
        assert expand(text) == ["d", "a", "d", "x"]  # a group may be followed at once
        return
    with pytest.raises(ConfigError) as error:
        expand(text)
    assert message in str(error.value)


@given(st.text(alphabet="admg*()| 12M-", max_size=14))
def test_any_text_expands_or_is_refused_with_a_config_error(text):
    try:
        layers = expand(text)
    except ConfigError as error:
        assert str(error).startswith("arch.pattern = ")
    else:
        assert layers and expand(layers) == layers  # an expanded pattern is a fixed point: it is what ids hash


def test_a_layer_says_what_feeds_it_and_what_it_adds():
    assert (feeder("gm"), branches("gm")) == ("g", ["m"])
    assert (feeder("(a|m)"), branches("(a|m)")) == (None, ["a", "m"])
    assert (feeder("g(a|m)"), branches("g(a|m)")) == ("g", ["a", "m"])
    assert letters(["m", "gm", "(a|m)"]) == ["m", "g", "a"]


def test_positions_place_layers():
    table = {"layers": 7, "fill": "m", "at": {"gm": [1, 4], "(a|m)": [6]}}
    assert expand(table) == ["m", "gm", "m", "m", "gm", "m", "(a|m)"]
    assert expand({"layers": 2, "fill": "a"}) == ["a", "a"]


def test_all_mistakes_of_a_table_of_positions_are_reported_at_once():
    table = {"layers": 6, "fill": "a d", "at": {"gm": [1, 1, 9], "a": [1, "2"], "ma(": [3], "d": [1]}, "rest": 1}
    with pytest.raises(ConfigError) as error:
        expand(table)
    for part in (
        "found rest",
        "arch.pattern.fill = 'a d': one layer is expected",
        "arch.pattern.at.gm: layer 1 also stands twice",
        "arch.pattern.at.gm: there is no layer 9; layers are numbered 0 to 5",
        "arch.pattern.at.a = [1, '2']: a list of layer numbers from 0",
        "arch.pattern.at.d: layer 1 also stands in arch.pattern.at.gm",
    ):
        assert part in str(error.value)
