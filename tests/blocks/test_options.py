"""Tables of keys to typed dataclasses: what is rounded, and what a missing key means."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from zexp.blocks import options
from zexp.config.identity import semantic, table_dict
from zexp.store.ids import canonical_json


@dataclass(frozen=True)
class Inner:
    rank: int
    alpha: float = semantic(8.0, absent=1.0)


@dataclass(frozen=True)
class Before:
    width: int
    eps: float = 1e-5


@dataclass(frozen=True)
class Later:
    """Before, with keys that came later and defaults that have changed since."""

    width: int
    eps: float = 1e-6
    softcap: float = semantic(30.0, absent=0.0)
    theta: float | None = semantic(10_000.0, absent=None)
    inner: Inner = field(default_factory=lambda: Inner(4))


def test_a_key_that_a_semantic_block_lacks_is_its_absent_value_and_not_the_default():
    stored = {**table_dict(Before(8)), "inner": {"rank": 2}}
    assert options.read(Later, stored, "here", stored=True) == (
        Later(8, eps=1e-5, softcap=0.0, theta=None, inner=Inner(2, alpha=1.0)),
        [],
    )
    assert options.read(Later, {"width": 8, "inner": {"rank": 2}}, "here") == (
        Later(8, eps=1e-6, softcap=30.0, theta=10_000.0, inner=Inner(2, alpha=8.0)),
        [],
    )


@pytest.mark.parametrize(
    "made",
    [Later(8), Later(8, softcap=0.0), Later(8, theta=None, inner=Inner(1, alpha=1.0)), Later(8, softcap=0.0, theta=None)],
)
def test_what_is_left_out_is_read_back(made):
    assert options.read(Later, table_dict(made), "here", stored=True) == (made, [])


def test_a_semantic_block_lacks_no_key_without_an_absent_value():
    # eps has a default, but the block was made under a default of its time, which nobody knows any more.
    made, problems = options.read(Later, {"width": 8, "inner": {}}, "here", stored=True)
    assert made is None
    assert sorted(problems) == [
        "here.eps: this semantic block lacks the key, which declares no `absent` value.",
        "here.inner.rank: this semantic block lacks the key, which declares no `absent` value.",
    ]


def test_floats_are_rounded_where_they_are_read():
    table = {"width": 8, "eps": 1.2345678901234e-5, "theta": 10_000.00000000001, "inner": {"rank": 1, "alpha": 0.1 + 0.2}}
    made, problems = options.read(Later, table, "here")
    assert made is not None and not problems
    assert (made.eps, made.theta, made.inner.alpha) == (1.23456789012e-5, 10_000.0, 0.3)
    canonical_json(table_dict(made))
