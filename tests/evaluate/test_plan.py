"""What eval.tasks may name, what goes into ids, and what is refused before anything starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zexp.config.errors import ConfigError
from zexp.evaluate import names
from zexp.evaluate.plan import PlannedTask, SourceInfo, eval_semantic, plan_tasks
from zexp.store.ids import semantic_id

TOKENIZER, CORPUS, OTHER = "a" * 64, "b" * 64, "c" * 64
SOURCES = {
    "base": SourceInfo({"kind": "embedded", "view": "base"}, CORPUS),
    "high_quality": SourceInfo({"kind": "embedded", "view": "high_quality"}, OTHER),
}
ALL = ["bpb", "cloze", "docstring", "recall"]
MINE = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: evals/mine.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def plan(tasks: list[str], directory: Path, sources: dict[str, SourceInfo] = SOURCES, **keys: Any) -> list[PlannedTask]:
    eval = {"tasks": tasks, "context_tokens": None, "limit": None, "batch_size": 16, **keys}
    return plan_tasks(
        eval, sources=sources, tokenizer=TOKENIZER, seq_len=256, directory=directory, cache=directory / "cache"
    )


def ids(planned: list[PlannedTask]) -> list[str]:
    state = {"id": "d" * 64, "tokens": 64}
    return [semantic_id(eval_semantic(p, semantic_id(p.documents) if p.documents else None, state)) for p in planned]


@pytest.fixture
def index(tmp_path: Path) -> None:
    """A cached index of lm-eval's names."""
    (tmp_path / "cache").mkdir()
    known = {"arc_easy": "arc/arc_easy.yaml", "hellaswag": "hellaswag/hellaswag.yaml", "mmlu": "group:mmlu/_mmlu.yaml"}
    (tmp_path / "cache" / f"lm_eval_tasks-{names.lm_eval_version()}.json").write_text(json.dumps(known))


def test_the_shipped_tasks_are_planned_with_their_parents(tmp_path: Path) -> None:
    planned = {task.name: task for task in plan(ALL, tmp_path)}
    assert list(planned) == ["bpb_base", "bpb_high_quality", "cloze", "docstring", "recall"]
    assert planned["bpb_base"].metrics == ["bits_per_byte"]
    assert all(planned[name].metrics == ["acc"] for name in ("cloze", "docstring", "recall"))
    assert planned["bpb_base"].parents == [("corpus", CORPUS), ("tokenizer", TOKENIZER)]
    assert planned["docstring"].parents == [("corpus", OTHER)]
    assert planned["recall"].parents == [("tokenizer", TOKENIZER)]
    assert planned["bpb_base"].task["yaml"]["task"] == "bpb_base"
    assert not (tmp_path / "cache").exists()  # no index of lm-eval's names was needed


def test_a_source_more_changes_no_other_tasks_id(tmp_path: Path) -> None:
    mine = {**SOURCES, "mine": SourceInfo({"kind": "text"}, "e" * 64)}
    before, after = plan(ALL, tmp_path), plan(ALL, tmp_path, mine)
    assert set(ids(after)) - set(ids(before)) == set(ids([task for task in after if task.name == "bpb_mine"]))


def test_what_a_score_depends_on_is_in_its_id_and_the_rest_is_not(tmp_path: Path) -> None:
    before = ids(plan(["bpb_base"], tmp_path))
    assert ids(plan(["bpb_base"], tmp_path, batch_size=3)) == before
    assert ids(plan(["bpb_base"], tmp_path, context_tokens=256)) == before  # seq_len, said
    assert ids(plan(["bpb_base"], tmp_path, context_tokens=128)) != before
    assert ids(plan(["bpb_base"], tmp_path, limit=8)) != before
    assert "limit" not in plan(["bpb_base"], tmp_path)[0].settings  # an unset key leaves no trace


def test_an_unknown_task_is_refused_with_what_may_have_been_meant(tmp_path: Path, index: None) -> None:
    with pytest.raises(ConfigError) as error:
        plan(["hellaswagg", "docstrin", "bpb_bas"], tmp_path)
    said = error.value.problems
    assert "there is no task 'hellaswagg'" in said[0] and "Did you mean hellaswag?" in said[0]
    assert "Did you mean docstring?" in said[1]
    assert "'bas', which is not among this run's sources: base, high_quality" in said[2]


def test_a_task_of_lm_evals_own_is_known_by_name_and_version(tmp_path: Path, index: None) -> None:
    easy, group = plan(["arc_easy", "mmlu"], tmp_path)
    assert easy.task == {"name": "arc_easy", "yaml": None, "lm_eval": names.lm_eval_version()}
    assert easy.documents is None and easy.request == {"index": "arc/arc_easy.yaml"}
    assert group.request == {"index": "group:mmlu/_mmlu.yaml"}


def test_docstrings_need_a_source_that_has_signatures(tmp_path: Path) -> None:
    mine = {"high_quality": SourceInfo({"kind": "text"}, CORPUS)}
    with pytest.raises(ConfigError, match=r"docstring needs docstrings with their signatures.*eval=bpb"):
        plan(["docstring"], tmp_path, mine)
    with pytest.raises(ConfigError, match="cloze reads held-out text of the source 'high_quality'"):
        plan(["cloze"], tmp_path, {"mine": SourceInfo({"kind": "text"}, CORPUS)})


def test_a_task_of_ones_own_goes_before_a_shipped_one_and_its_data_are_in_its_id(tmp_path: Path) -> None:
    folder = tmp_path / "evals"
    folder.mkdir()
    (folder / "mine.jsonl").write_text('{"question": "a", "choices": ["b", "c"], "answer": 0}\n')
    (folder / "mine.yaml").write_text(MINE)
    (folder / "cloze.yaml").write_text(MINE.replace("task: mine", "task: cloze"))
    mine, cloze = plan(["mine", "cloze"], tmp_path)
    assert mine.documents is None and cloze.documents is None
    assert mine.metrics == ["acc"]
    assert mine.task["files"]["evals/mine.jsonl"]["bytes"] == 54
    before = ids([mine])
    (folder / "mine.jsonl").write_text('{"question": "a", "choices": ["b", "c"], "answer": 1}\n')
    assert ids(plan(["mine"], tmp_path)) != before


def test_the_code_that_a_task_names_is_in_its_id(tmp_path: Path) -> None:
    folder = tmp_path / "evals"
    folder.mkdir()
    (folder / "code.py").write_text("def process(doc, results):\n    return {'acc': 0.0}\n")
    (folder / "shared.yaml").write_text("process_results: !function code.process\n")
    (folder / "mine.yaml").write_text("include: shared.yaml\n" + MINE)
    (folder / "mine.jsonl").write_text("{}\n")
    (task,) = plan(["mine"], tmp_path)
    assert task.task["yaml"]["process_results"] == "!function code.process"
    assert set(task.task["files"]) == {"code.py", "evals/mine.jsonl"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MINE.replace("evals/mine.jsonl", "nowhere.jsonl"), "names 'nowhere.jsonl', and there is no such file"),
        (
            MINE.replace("dataset_kwargs: {data_files: {test: evals/mine.jsonl}}", ""),
            "dataset_kwargs.data_files must name",
        ),
        ("task: [mine", "no YAML that can be read"),
        ("- task", "an lm-eval task is a YAML mapping"),
        ("include: mine.yaml\ntask: mine", "includes itself"),
        (MINE + "metadata: {since: 2024-01-01}", "is a date; quote it"),
    ],
)
def test_a_yaml_that_cannot_work_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        plan(["mine"], tmp_path)


def test_two_yamls_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "evals").mkdir()
    for name in ("a", "b"):
        (tmp_path / "evals" / f"{name}.yaml").write_text("task: mine\n")
    with pytest.raises(ConfigError, match="both define the task 'mine'"):
        plan(["mine"], tmp_path)


def test_every_wrong_setting_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        plan(["bpb"], tmp_path, context_tokens=1, limit=0, batch_size=0)
    assert [text.split(" ")[0] for text in error.value.problems] == [
        "eval.context_tokens",
        "eval.limit",
        "eval.batch_size",
    ]


def test_planning_imports_neither_torch_nor_lm_eval_nor_datasets() -> None:
    code = "import sys, zexp.evaluate.plan; print(sorted({'torch', 'lm_eval', 'datasets', 'tokenizers'} & sys.modules.keys()))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
