"""The names that lm-eval's task YAMLs define, read as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from zexp.evaluate import names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tasks" / "arc").mkdir(parents=True)
    (tmp_path / "tasks" / "arc" / "arc_easy.yaml").write_text(
        "tag:\n  - ai2_arc  # the pair\n  - 'science'\ntask: arc_easy\n"
    )
    (tmp_path / "tasks" / "arc" / "arc_hard.yaml").write_text('"include": _default\n"task": "arc_hard"\n')
    (tmp_path / "tasks" / "arc" / "group.yaml").write_text("group: arc_all\ntask:\n  - arc_easy\n  - task: arc_hard\n")
    (tmp_path / "tasks" / "arc" / "_default").write_text("tag: [one, two]\noutput_type: multiple_choice\n")
    return tmp_path / "tasks"


def test_tasks_groups_and_tags_are_told_apart(folder: Path) -> None:
    assert names.scan(folder) == {
        "arc_easy": "arc/arc_easy.yaml",
        "arc_hard": "arc/arc_hard.yaml",
        "arc_all": "group:arc/group.yaml",
        "ai2_arc": "tag:",
        "science": "tag:",
        "one": "tag:",
        "two": "tag:",
    }


def test_the_index_is_built_once_per_version_and_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "lm_eval_folder", lambda: folder)
    first = names.lm_eval_names(tmp_path / "cache")
    monkeypatch.setattr(names, "scan", lambda folder: pytest.fail("it was built already"))
    assert names.lm_eval_names(tmp_path / "cache") == first
    monkeypatch.undo()
    monkeypatch.setattr(names, "scan", lambda folder: {"new": "new.yaml"})
    monkeypatch.setattr(names, "lm_eval_version", lambda: "99.0")
    assert names.lm_eval_names(tmp_path / "cache") == {"new": "new.yaml"}


def test_near_names_are_close_ones_else_those_that_hold_the_word() -> None:
    known = ["hellaswag", "hellaswag_de", "arc_easy", "winogrande"]
    assert names.near("helaswag", known)[0] == "hellaswag"
    assert names.near("arc", known) == ["arc_easy"]
    assert names.near("xyzzy", known) == []


@pytest.mark.slow
def test_the_text_of_lm_evals_yamls_gives_the_names_of_its_own_index() -> None:
    from lm_eval.tasks import TaskManager

    ours, theirs = names.scan(names.lm_eval_folder()), TaskManager()
    assert set(theirs.all_subtasks) <= {name for name, where in ours.items() if ":" not in where}
    assert set(theirs.all_groups) <= {name for name, where in ours.items() if where.startswith("group:")}
    assert set(theirs.all_tags) <= ours.keys()
