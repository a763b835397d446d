"""Points of a study: the grid, zip, arms, seeds and the command line, and how they are named."""

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st

from hydra_plugins.zexp.sweeper import axis_of
from zexp.config.errors import ConfigError
from zexp.study.variants import CommandLine, Typed, name_of, override_text, points, row_of, study_name

EMPTY: dict[str, Any] = {
    "name": None, "question": None, "grid": {}, "zip": {}, "arms": {}, "seeds": None, "exclude": [],
    "baseline": {}, "metric": None, "scales": {},
}  # fmt: skip


def made(command_line: CommandLine | None = None, **study: Any) -> list[str]:
    return [
        name_of(point.axes, "arch", "anneal")
        for point in points({**EMPTY, **study}, "tiny", command_line or CommandLine(), 0)
    ]


def test_names_are_the_axes_values_in_the_order_grid_arms_seed():
    assert made(grid={"arch": ["a", "b"]}, arms={"control": [], "replay": []}, seeds=[0, 1])[:3] == [
        "a,control,seed=0",
        "a,control,seed=1",
        "a,replay,seed=0",
    ]
    assert made(grid={"anneal.peak_fraction": [0.5]}) == ["peak_fraction=0.5"]


def test_a_study_without_axes_is_one_point_named_by_its_choices():
    assert made() == ["arch,anneal"]
    assert row_of({"seed": 1}, "zamba2_tiny", None) == "zamba2_tiny"


def test_zipped_axes_walk_together():
    assert made(zip={"arch": ["a", "b"], "anneal.tokens": [1, 2]}) == ["a,tokens=1", "b,tokens=2"]
    with pytest.raises(ConfigError, match="lengths differ"):
        made(zip={"arch": ["a", "b"], "anneal.tokens": [1]})


def test_excluded_combinations_are_left_out_and_must_name_axes():
    assert made(grid={"arch": ["a", "b"], "mix": ["x", "y"]}, exclude=[{"arch": "a", "mix": "y"}]) == ["a,x", "b,x", "b,y"]
    with pytest.raises(ConfigError, match="is no axis"):
        made(grid={"arch": ["a"]}, exclude=[{"archh": "a"}])
    with pytest.raises(ConfigError, match="nothing is left"):
        made(grid={"arch": ["a"]}, exclude=[{"arch": "a"}])


def test_an_axis_of_the_command_line_replaces_the_studys():
    typed = CommandLine(axes={"arch": ["c", "d"], "seed": ["0", "1"]})
    assert made(typed, grid={"arch": ["a", "b"]}, seeds=[5]) == ["c,seed=0", "c,seed=1", "d,seed=0", "d,seed=1"]


def test_a_plain_override_replaces_an_axis_too():
    assert made(CommandLine(fixed=["arch=c"]), grid={"arch": ["a", "b"], "mix": ["x"]}) == ["x"]


def test_overriding_what_the_arms_set_is_refused():
    with pytest.raises(ConfigError, match="would undo what the arm 'replay' sets"):
        made(CommandLine(fixed=["anneal=none"]), arms={"replay": ["anneal=replay60"]})


def test_scale_comes_before_grid_and_arms_and_the_command_line_last():
    (point,) = points(
        {**EMPTY, "scales": {"tiny": ["anneal.tokens=1", "seed=9"]}, "arms": {"long": ["anneal.tokens=2"]}},
        "tiny",
        CommandLine(fixed=["seed=3"]),
        0,
    )
    assert point.overrides == ["anneal.tokens=2", "seed=3"]


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9)
    | st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="$\\"), max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(values)
@example(".0")
@example("null")
@example("True")
@example("NaN")
@example("-inf")
@example("1e5")
def test_hydra_reads_a_value_as_it_was_written(value):
    parsed = OverridesParser.create().parse_override(override_text("key", value))
    assert parsed.value() == value
    assert not parsed.is_sweep_override()


def test_a_typed_value_is_passed_on_as_it_is():
    assert override_text("key", Typed("'a b'")) == "key='a b'"


def test_a_study_without_a_name_is_named_by_its_overrides_and_a_hash():
    assert study_name(EMPTY, ["arch=zamba2_tiny"], "abcdef0123") == "arch=zamba2_tiny-abcdef01"
    with pytest.raises(ConfigError, match="folder name"):
        study_name({**EMPTY, "name": "../up"}, [], "")


@pytest.mark.parametrize(
    ("study", "says"),
    [
        ({"grid": {"anneal": ["control", "replay60"]}, "arms": {"x": ["anneal=control"]}}, "the arm 'x' sets it"),
        ({"zip": {"a.b": [1, 2]}, "arms": {"x": ["a.b=3"]}}, "the arm 'x' sets it"),
        ({"grid": {"seed": [0, 1]}, "seeds": [5]}, "the seeds of a study are study.seeds"),
        ({"arms": {"x": ["seed=3"]}, "seeds": [0, 1]}, "the seeds of a study are study.seeds"),
        ({"seeds": [0, -1]}, "'-1': a seed is a whole number"),
    ],
)
def test_what_would_undo_an_axis_is_refused(study, says):
    with pytest.raises(ConfigError, match=says):
        points({**EMPTY, **study}, "tiny", CommandLine(), 0)


def test_a_scale_that_is_an_axis_applies_its_own_overrides():
    study = {**EMPTY, "grid": {"scale": ["tiny", "smoke"]}, "scales": {"smoke": ["anneal.tokens=16K"]}}
    found = {point.axes["scale"]: point.overrides for point in points(study, "tiny", CommandLine(), 0)}
    assert "anneal.tokens=16K" in found["smoke"] and "anneal.tokens=16K" not in found["tiny"]


def test_zipped_group_choices_walk_together_and_keep_their_order_in_names_and_overrides():
    study = {**EMPTY, "zip": {"arch": ["a", "b"], "mix@anneal.mix": ["x", "y"]}, "grid": {"schedule": ["wsd", "cosine"]}}
    found = points(study, "tiny", CommandLine(), 0)
    assert [point.overrides for point in found] == [
        ["schedule=wsd", "arch=a", "mix@anneal.mix=x"],
        ["schedule=wsd", "arch=b", "mix@anneal.mix=y"],
        ["schedule=cosine", "arch=a", "mix@anneal.mix=x"],
        ["schedule=cosine", "arch=b", "mix@anneal.mix=y"],
    ]


def test_zipped_axes_are_replaced_together_or_not_at_all():
    zipped = {"arch": ["a", "b"], "anneal.tokens": [1, 2]}
    assert made(CommandLine(axes={"arch": ["c", "d"], "anneal.tokens": ["3", "4"]}), zip=zipped) == ["c,tokens=3", "d,tokens=4"]
    assert made(CommandLine(["anneal.tokens=3"], {"arch": ["c", "d"]}), zip=zipped) == ["c", "d"]
    assert made(CommandLine(["anneal.tokens=3", "arch=c"]), zip=zipped) == ["arch,anneal"]
    with pytest.raises(ConfigError, match=r"arch is zipped with anneal\.tokens"):
        made(CommandLine(axes={"arch": ["c", "d"]}), zip=zipped)
    with pytest.raises(ConfigError, match="lengths differ"):
        made(CommandLine(axes={"arch": ["c", "d"], "anneal.tokens": ["3"]}), zip=zipped)


def test_an_exclusion_of_several_keys_needs_all_of_them_arms_and_seeds_included():
    study = {
        "grid": {"arch": ["a", "b"]}, "zip": {"mix": ["x", "y"], "seq_len": [1, 2]}, "arms": {"long": [], "short": []}, "seeds": [0, 1],
        "exclude": [{"arch": "a", "mix": "y", "arm": "short", "seed": 1}, {"arch": "b", "seq_len": 1}],
    }  # fmt: skip
    names = made(**study)
    assert len(names) == 16 - 1 - 4
    assert "a,y,seq_len=2,short,seed=1" not in names and "a,y,seq_len=2,short,seed=0" in names
    assert not any(name.startswith("b,x") for name in names)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"arch": "c"}, r"study\.exclude: \{arch: c\} leaves out nothing.*arch: a, b"),
        ({"arch": "a", "mix": "yy"}, r"\{arch: a, mix: yy\} leaves out nothing.*mix: x, y"),
        ({"arch": "a", "seq_len": 2}, r"\{arch: a, seq_len: 2\} leaves out nothing"),  # zipped: a goes with 1
        ({}, "an empty entry"),
    ],
)
def test_an_exclusion_that_leaves_out_nothing_is_a_typo(entry, says):
    with pytest.raises(ConfigError, match=says):
        made(zip={"arch": ["a", "b"], "seq_len": [1, 2]}, grid={"mix": ["x", "y"]}, exclude=[entry])


def test_exclusions_hold_where_the_command_line_narrows_the_study():
    study = {"grid": {"arch": ["a", "b"], "mix": ["x", "y"]}, "exclude": [{"arch": "a", "mix": "y"}]}
    assert made(CommandLine(["arch=a"]), **study) == ["x"]
    assert made(CommandLine(["arch=b"]), **study) == ["x", "y"]
    assert made(CommandLine(axes={"arch": ["b", "c"]}), **study) == ["b,x", "b,y", "c,x", "c,y"]
    with pytest.raises(ConfigError, match="leaves out nothing"):
        made(CommandLine(["arch=a"]), **{**study, "exclude": [{"arch": "a", "mix": "typo"}]})


@pytest.mark.parametrize(
    ("values", "excluded", "left"),
    [
        ([1e-3, 2e-3], 0.001, ["k=0.002"]),
        ([0.001, 1], 1.0, ["k=0.001"]),
        ([True, False], True, ["k=false"]),
        ([None, 1], None, ["k=1"]),
        ([None, "none"], "none", ["k=null"]),
        (["a,b", "it's"], "a,b", ["k=it's"]),
        ([[1, 2], [1]], [1, 2], ["k=[1]"]),
        ([1, True], True, ["k=1"]),
    ],
)
def test_exclusions_compare_values_not_their_spelling(values, excluded, left):
    assert made(grid={"a.k": values}, exclude=[{"a.k": excluded}]) == left


LINES = [
    ("1e-3,0.002", ["k=0.001", "k=0.002"]), ("null,true,False", ["k=null", "k=true", "k=false"]),
    ("'a,b','c d'", ["k=a,b", "k=c d"]), ("[1,2],[3]", ["k=[1, 2]", "k=[3]"]), ("range(1,4)", ["k=1", "k=2", "k=3"]),
    (r"'it\'s',x", ["k=it's", "k=x"]),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "names"), LINES)
def test_an_axis_of_the_command_line_has_the_names_and_values_of_one_in_a_file(typed, names):
    (override,) = OverridesParser.create().parse_overrides([f"a.k={typed}"])
    command_line = CommandLine(axes={"a.k": axis_of(override)})
    found = points({**EMPTY, "grid": {"a.k": ["old"]}}, "tiny", command_line, 0)
    assert [name_of(point.axes, "arch", None) for point in found] == names
    read = [OverridesParser.create().parse_override(point.overrides[0]).value() for point in found]
    assert read == [point.axes["a.k"] for point in found]
    from_file = points({**EMPTY, "grid": {"a.k": read}}, "tiny", CommandLine(), 0)
    assert [point.axes for point in from_file] == [point.axes for point in found]


def test_an_axis_with_a_plus_replaces_the_studys_and_keeps_its_plus():
    (one, _) = points({**EMPTY, "grid": {"a.k": [7]}}, "tiny", CommandLine(axes={"++a.k": [Typed("1", 1), Typed("2", 2)]}), 0)
    assert one.axes == {"a.k": 1} and one.overrides == ["++a.k=1"]
