"""The picture: one file, with every pass in it, under the ceilings that were measured."""

import json
import re
from xml.etree import ElementTree

import pytest

from tests.bench.conftest import CEILINGS, answer_of, asked
from zexp.bench import blocks, roofline

WORDS = ("--blocks", "a", "m", "--width", "32", "--seq-len", "16", "--batch", "1", "--seconds", "3", "--device", "cpu")


@pytest.fixture
def answer(ceilings, capsys):
    return answer_of(blocks, asked(blocks, *WORDS), capsys)


def test_a_page_holds_every_pass_and_needs_no_network(answer):
    text = roofline.page(answer)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert len(data["points"]) == 2 * len(answer["rows"]) == 8
    assert data["ceilings"] == CEILINGS and set(data["colours"]) == {"attention", "mamba2"}
    point = next(one for one in data["points"] if (one["block"], one["dtype"], one["pass"]) == ("mamba2", "bf16", "backward"))
    row = next(row for row in answer["rows"] if (row["block"], row["dtype"]) == ("mamba2", "bf16"))
    assert point["flops_per_second"] == row["backward"]["flops_per_second"] and point["intensity"] == row["backward"]["intensity"]
    assert "d3js.org" in text or "d3 = " in text or "d3=" in text, "d3 is in the file"
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="(?!data:)', text)


def test_a_picture_is_svg_that_names_the_blocks(answer):
    text = roofline.svg(answer)
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    # matplotlib draws letters as shapes and says in comments which.
    for name in ("attention", "mamba2", "ceiling, bf16", "FLOPs a byte"):
        assert f"<!-- {name} -->" in text


def test_the_roof_bends_where_products_are_as_fast_as_memory():
    xs, ys = roofline.roof(CEILINGS, "bf16", 1.0, 1000.0)
    assert xs == [1.0, 40.0, 1000.0] and ys == [2e10, 8e11, 8e11]
    assert roofline.extent([{"intensity": 5.0}], CEILINGS) == (2.5, 80.0)


@pytest.mark.parametrize("name", ["roof.html", "roof.svg"])
def test_the_file_is_written_where_it_is_asked_for(ceilings, capsys, tmp_path, name):
    answer = answer_of(blocks, asked(blocks, *WORDS, "--plot", str(tmp_path / name)), capsys)
    assert answer["plot"] == str(tmp_path / name) and (tmp_path / name).stat().st_size > 10_000
