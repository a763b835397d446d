import dataclasses

import pytest

from zexp.config.identity import kind_of, semantic, semantic_dict
from zexp.config.schema import schemas


@pytest.mark.parametrize("schema", schemas(), ids=lambda s: s.__name__)
def test_every_field_is_declared_semantic_or_execution(schema):
    undeclared = [field.name for field in dataclasses.fields(schema) if kind_of(field) is None]
    assert undeclared == []


def test_no_dataclass_of_the_schema_is_left_out_of_the_list():
    import zexp.config.schema as module

    found = {c for c in vars(module).values() if dataclasses.is_dataclass(c) and c.__module__ == module.__name__}
    assert found == set(schemas())


def test_a_later_field_stays_out_of_the_hash_while_it_means_as_before():
    @dataclasses.dataclass
    class Before:
        width: int = semantic(1)

    @dataclasses.dataclass
    class After:
        width: int = semantic(1)
        softcap: float = semantic(0.0, absent=0.0)

    assert semantic_dict(After()) == semantic_dict(Before())
    assert semantic_dict(After(softcap=30.0)) == {"width": 1, "softcap": 30.0}


def test_an_undeclared_field_is_refused_when_hashed():
    @dataclasses.dataclass
    class Forgotten:
        width: int = 1

    with pytest.raises(AssertionError, match=r"Forgotten\.width"):
        semantic_dict(Forgotten())
