"""A table that is semantic as a whole: plain fields count, later ones stay out while they mean "as before"."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest

from zexp.config.identity import absents, execution, semantic, table_dict


@dataclass(frozen=True)
class Inner:
    rank: int = 0
    scale: float = semantic(2.0, absent=1.0)


@dataclass(frozen=True)
class Table:
    width: int
    inner: Inner = field(default_factory=Inner)
    pair: tuple[int, int] = (1, 2)
    softcap: float = semantic(30.0, absent=0.0)


def test_plain_fields_and_later_ones_are_in_the_table():
    made = table_dict(Table(8))
    assert made == {"width": 8, "inner": {"rank": 0, "scale": 2.0}, "pair": [1, 2], "softcap": 30.0}


def test_what_equals_its_absent_value_is_left_out_at_any_depth():
    assert table_dict(Table(8, inner=Inner(scale=1.0), softcap=0.0)) == {"width": 8, "inner": {"rank": 0}, "pair": [1, 2]}


def test_without_absent_values_the_table_is_asdict():
    assert table_dict(Inner(rank=3)) == dataclasses.asdict(Inner(rank=3))


def test_the_absent_values_are_those_declared():
    assert absents(Table) == {"softcap": 0.0}
    assert absents(Inner()) == {"scale": 1.0}


def test_execution_has_no_place_in_such_a_table():
    @dataclass
    class Wrong:
        log_every: int = execution(10)

    with pytest.raises(AssertionError, match=r"Wrong\.log_every"):
        table_dict(Wrong())
