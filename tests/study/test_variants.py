"""Points of a study: the grid, zip, arms, seeds and the command line, and how they are named."""

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st

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
