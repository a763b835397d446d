"""The YAML of README and docs composes as it stands there."""

import dataclasses
import json
import re
from pathlib import Path

import polars
import pytest

from tests.test_cli import zexp
from zexp.blocks.table import TABLE, spec_class

ROOT = Path(__file__).resolve().parent.parent
YAML = re.compile(r"```yaml\n(.*?)```", re.DOTALL)


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A folder with the files of docs/own.md, and texts for their sources."""
    arch, _positions, corpus, mix, anneal = YAML.findall((ROOT / "docs/own.md").read_text())
    files = {"arch/own": arch, "corpus/lab": corpus, "mix/lab": mix, "anneal/books60": anneal}
    files["mix/books"] = "sources:\n  books: {weight: 1, max_epochs: null}\n"
    for name, text in files.items():
        path = tmp_path / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for folder in ("texts", "shards"):
        (tmp_path / folder).mkdir()
    (tmp_path / "texts/x.txt").write_text("".join(f"Paragraph {n} of many.\n\n" for n in range(3000)))
    for name in "ab":
        lines = (json.dumps({"content": f"line {n} of {name}"}) for n in range(3000))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    polars.DataFrame({"text": [f"def f{n}(x): return x + {n}" for n in range(3000)]}).write_parquet(tmp_path / "shards/c.parquet")
    return tmp_path


@pytest.mark.parametrize("anneal", [["anneal=books60"], ["anneal=replay60", "mix@anneal.mix=books"]])
def test_the_parts_of_ones_own_are_planned(lab, anneal):
    words = ["arch=own", "corpus=lab", "mix=lab", "eval=bpb", *anneal, "phases.pretrain.tokens=64K", "schedule.warmup_tokens=8K"]
    done = zexp("plan", "--json", *words, "anneal.tokens=32K", cwd=lab)
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)["stages"]
    (read,) = (set(s["parents"]) for s in stages if s["phase"] == "anneal" and s["kind"] == "segment")
    labels = {s["label"] for s in stages if s["id"] in read and s["kind"] == "packing"}
    assert labels == {"packing books", "packing web"}


@pytest.mark.parametrize("page", ["README.md", "docs/study.md"])
def test_the_study_of_the_page_is_planned(page, tmp_path):
    study = next(text for text in YAML.findall((ROOT / page).read_text()) if "@package" in text)
    (tmp_path / "conf/sweeps").mkdir(parents=True)
    (tmp_path / "conf/sweeps/rewarm.yaml").write_text(study)
    done = zexp("plan", "--json", "+sweeps=rewarm", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["variants"] == 12


def test_the_table_of_blocks_has_every_letter_and_every_key():
    rows = dict(re.findall(r"^\| `(\w)` \| (.*) \|$", (ROOT / "docs/own.md").read_text(), re.MULTILINE))
    assert set(rows) == set(TABLE)
    attention = {field.name for field in dataclasses.fields(spec_class("a"))}
    for letter, row in rows.items():
        keys = {field.name for field in dataclasses.fields(spec_class(letter))}
        keys -= attention if letter == "w" else set()
        missing = keys - set(re.findall(r"\w+", row))
        assert not missing, f"{letter}: {missing}"
