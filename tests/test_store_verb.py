"""zexp store as a user types it: what it prints, asks, refuses, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.report.synthetic import Study, make
from tests.test_cli import zexp
from zexp.store.folder import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = make(Study(tmp_path / "store", archs=("transformer_tiny", "zamba2_tiny")))
    old = time.time() - 7200
    for path in made.root.rglob("config.yaml"):  # what is younger than an hour is nobody's to delete
        os.utime(path, (old, old))
    return made


def answer(store: Store, *words: str, code: int = 0) -> dict:
    done = zexp("store", *words, "--json", cwd=store.root.parent)
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)


def said(store: Store, *words: str, code: int = 0, columns: str = "160") -> str:
    done = zexp("store", *words, cwd=store.root.parent, COLUMNS=columns)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_ls_lists_every_stage_with_who_names_it(store):
    stages = answer(store, "ls")["stages"]
    listed = json.loads((store.study("invented") / "variants.json").read_text())["stages"]
    assert {f"{stage['kind']}/{stage['id']}" for stage in stages} == {stage["folder"] for stage in listed}
    assert all(stage["studies"] == ["invented"] and stage["status"] == "done" and not stage["orphan"] for stage in stages)
    assert {stage["id"] for stage in answer(store, "ls", "inv", "--kind", "eval")["stages"]} == {
        stage["id"] for stage in listed if stage["kind"] == "eval"
    }
    assert [len(stage["states"]) for stage in stages if stage["kind"] == "trajectory"] == [1] * 8


@pytest.mark.parametrize("columns", ["80", "160"])
def test_ls_fits_its_columns_and_cuts_nothing_off(store, columns):
    text = said(store, "ls", columns=columns)
    assert all(len(line) <= int(columns) for line in text.splitlines()[:-3])
    for stage in answer(store, "ls")["stages"]:
        assert stage["id"] in text
    assert "676 K weights" in text and "26 stages" not in text and "all named by invented" in text


def test_ls_knows_failed_diverged_missing_and_running(tmp_path):
    outcomes = {"zamba2_tiny anneal control": "diverged", "zamba2_tiny anneal replay60": "failed"}
    made = make(Study(tmp_path / "store", archs=("zamba2_tiny",), outcome=lambda stage: outcomes.get(stage["label"], "done")))
    by_label = {stage["labels"][0]: stage["status"] for stage in answer(made, "ls")["stages"]}
    assert by_label["zamba2_tiny anneal control"] == "diverged" and by_label["zamba2_tiny anneal replay60"] == "failed"
    assert "missing" in {answered["status"] for answered in answer(made, "ls", "--kind", "eval")["stages"]}
    failed = next(stage for stage in answer(made, "ls")["stages"] if stage["status"] == "failed")
    (folder,) = made.find(failed["id"])
    with folder.attempt({"to": 1}):
        assert {s["id"]: s["status"] for s in answer(made, "ls")["stages"]}[failed["id"]] == "running"


def test_du_adds_up(store):
    usage = answer(store, "du")
    kinds = sum(kind["bytes"]["disk"] for kind in usage["kinds"].values())
    assert usage["bytes"]["disk"] == kinds + sum(size["disk"] for size in usage["other"].values())
    assert usage["studies"]["invented"]["bytes"]["disk"] == usage["studies"]["invented"]["exclusive"]["disk"] == kinds
    assert "what could be freed" in said(store, "du") and "by study" in said(store, "du", columns="80")
    twin = store.study("twin")
    twin.mkdir()
    (twin / "variants.json").write_text((store.study("invented") / "variants.json").read_text())
    assert answer(store, "du")["studies"]["invented"]["exclusive"]["disk"] == 0


def test_verify_is_quiet_about_what_is_whole_and_exits_1_for_what_is_not(store):
    assert "all whole" in said(store, "verify")
    target = next(store.root.glob("eval/*/result/samples.jsonl"))
    target.write_bytes(b"x" + target.read_bytes()[1:])
    stage = target.parent.parent
    assert "all whole" in said(store, "verify", "--quick")
    found = answer(store, "verify", code=1)["damaged"]
    assert [(one["stage"], one["place"]) for one in found] == [(f"eval/{stage.name}", "result")]
    assert "all whole" in said(store, "verify", next(store.root.glob("tokenizer/*")).name)
    assert "1 damaged" in said(store, "verify", "invented", code=1)
    text = said(store, "verify", stage.name, "--set-aside", code=1)
    assert "set aside: the next run" in text and not (stage / "result").exists()
    assert "all whole" in said(store, "verify")


def test_an_unreadable_record_is_damage_and_stops_gc(store):
    (store.study("invented") / "variants.json").write_text('{"study": {}}')
    (found,) = answer(store, "verify", code=1)["damaged"]
    assert found["stage"] == "studies/invented" and "it has no stages, variants, pretrained" in found["problem"]
    assert "is no record of a study" in said(store, "gc", code=1)


def test_rm_asks_and_gc_says_first_and_deletes_then(store):
    before = sorted(store.root.rglob("*"))
    assert "Nobody is there to be asked" in said(store, "rm", "invented", code=2)
    assert "has to be named in full" in said(store, "rm", "inv", "--yes", code=2)
    assert "Nothing to delete. With --orphans" in said(store, "gc")
    assert sorted(store.root.rglob("*")) == before
    assert "was removed" in said(store, "rm", "invented", "--yes")
    assert not store.study("invented").exists()
    dry = answer(store, "gc", "--orphans")
    assert dry["dry_run"] and dry["tokens_to_train_again"] == 2 * (141 * 4096 + 2 * 24 * 4096)
    text = said(store, "gc", "--orphans", columns="80")
    assert "Nothing was deleted" in text and "zexp store gc --orphans --yes" in text and "24 evaluations" not in text
    assert list(store.root.glob("trajectory/*/states/*"))
    assert "Nothing to delete" in said(store, "gc", "--orphans", "--older-than", "1")
    done = answer(store, "gc", "--orphans", "--yes")
    assert [drop["path"] for drop in done["drops"]] == [drop["path"] for drop in dry["drops"]]
    assert not [path for path in store.root.rglob("*") if path.is_file()]
    assert "No stage in" in said(store, "ls")


def test_a_study_that_runs_is_not_removed(store):
    folder = next(store.folders("trajectory"))
    with folder.attempt({"to": 1}):
        assert "is running: process" in said(store, "rm", "invented", "--yes", code=2)
    assert store.study("invented").exists()


def test_wrong_requests_are_all_said_at_once(store):
    text = said(store, "gc", "--keep-revisions", "-1", "--older-than", "-3", code=2)
    assert "--keep-revisions -1" in text and "--older-than -3.0" in text
    assert "is no folder" in said(store, "ls", "--store", "nowhere", code=2)
    assert "is no study" in said(store, "export", "nobody", code=2)
    assert "there is no folder" in said(store, "export", "invented", "-o", "no/where.tar", code=2)
    assert "invalid choice" in said(store, "fsck", code=2)


def test_a_study_goes_to_another_store_and_its_report_is_the_same(store):
    lab = store.root.parent
    text = said(store, "export", "invented")
    assert "invented.tar.gz: invented," in text and "zexp store import invented.tar.gz" in text
    assert "there already" in said(store, "export", "invented", code=2)
    assert "new stages" in said(store, "import", "invented.tar.gz", "--store", "there")
    here, there = (zexp("report", "invented", "--store", name, cwd=lab) for name in ("store", "there"))
    assert here.returncode == there.returncode == 0
    assert there.stdout.replace(str(lab / "there"), "S") == here.stdout.replace(str(lab / "store"), "S")
    for suffix in ("json", "csv", "md", "tex", "html"):
        one, other = ((lab / name / f"studies/invented/report/leaderboard.{suffix}").read_text() for name in ("store", "there"))
        assert other.replace(str(lab / "there"), "S") == one.replace(str(lab / "store"), "S"), suffix
    assert answer(store, "import", "invented.tar.gz", "--store", "there")["new"] == []


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("zexp store ", {"ls", "du", "verify", "gc", "rm", "export", "import"}),
        ("zexp store e", {"export"}),
        ("zexp store ls inv", {"invented"}),
        ("zexp store export --states ", {"none", "ends", "all"}),
        ("zexp store export --states ends ", {"invented"}),
        ("zexp store ls --kind t", {"tokenizer", "tasks", "trajectory"}),
        ("zexp store gc --o", {"--orphans", "--older-than"}),
        ("zexp store gc --orphans --o", {"--older-than"}),
        ("zexp store gc x", set()),
        ("zexp sto", {"store"}),
    ],
)
def test_the_shell_completes_parts_options_and_studies(store, line, offered):
    done = zexp("-sc", "query=bash", cwd=store.root.parent, COMP_LINE=line, COMP_POINT=str(len(line)), ZEXP_STORE="store")
    assert set(done.stdout.split()) == offered and done.stderr == ""


def test_no_part_imports_torch_or_hydras_app(store):
    code = (
        "import sys; from zexp.cli import main\n"
        "for words in (['ls'], ['du'], ['verify'], ['gc', '--orphans'], ['export', 'invented', '-o', 'a.tar'], ['import', 'a.tar', '--as', 'b']):\n"
        "    assert main(['store', *words]) == 0\n"
        "print([m for m in ('torch', 'lm_eval', 'submitit') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=store.root.parent, check=True, capture_output=True, text=True)
    assert done.stdout.endswith("[]\n"), done.stdout


def test_the_page_names_parts_and_options_that_there_are():
    from zexp import store_verb

    page = (Path(__file__).parent.parent / "docs/store.md").read_text(encoding="utf-8")
    assert set(re.findall(r"zexp store ([a-z]+)", page)) == set(store_verb.PARTS)
    known = {option for part in store_verb.PARTS for option in store_verb._options(part)} | {"--yes"}
    assert set(re.findall(r"--[a-z][a-z-]+", page)) <= known
