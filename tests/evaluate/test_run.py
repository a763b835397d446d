"""The tasks and eval stages on a small store, as a launcher runs them."""

from __future__ import annotations

import hashlib
import json
import math
import random
import socket
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from tests.conftest import TinyCorpus, build
from tests.evaluate.models import adapter_of, state_of
from zexp.data import corpus, tokenizer
from zexp.data.tokenizer import EOD_ID
from zexp.evaluate import run as eval_stage
from zexp.evaluate import tasks as tasks_stage
from zexp.evaluate.plan import PlannedTask, SourceInfo, eval_semantic, plan_tasks
from zexp.store.errors import StoreError
from zexp.store.folder import Store
from zexp.store.ids import semantic_id

REQUEST = {"threads": 1, "device": "cpu", "kernels": "auto", "deterministic": True}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("an evaluation of local data went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def sources_of(store: Store, tiny: TinyCorpus) -> dict[str, SourceInfo]:
    found = {}
    for name, packing in tiny.packings.items():
        id_ = store.folder("packing", packing).semantic()["corpus"]
        found[name] = SourceInfo(store.folder("corpus", id_).semantic()["source"], id_)
    return found


def planned(store: Store, tiny: TinyCorpus, tasks: list[str], directory: Path, **keys: Any) -> list[PlannedTask]:
    return plan_tasks(
        {"tasks": tasks, **keys},
        sources=sources_of(store, tiny),
        tokenizer=tiny.tokenizer,
        seq_len=64,
        directory=directory,
        cache=directory / "cache",
    )


def scored(
    store: Store, task: PlannedTask, state: dict[str, Any], batch_size: int = 16
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(results.json, lines of samples.jsonl) of a task, its documents built first."""
    tasks_id = None
    if task.documents is not None:
        tasks_id = build(store, "tasks", task.documents, tasks_stage.run, REQUEST)
    request = {**REQUEST, "eval": {"batch_size": batch_size, **task.request}}
    id_ = build(store, "eval", eval_semantic(task, tasks_id, state), eval_stage.run, request)
    result = store.folder("eval", id_).result
    assert result is not None
    lines = (result / "samples.jsonl").read_text().splitlines()
    return json.loads((result / "results.json").read_text()), [json.loads(line) for line in lines]


def documents_of(store: Store, task: PlannedTask) -> list[dict[str, Any]]:
    assert task.documents is not None
    result = store.folder("tasks", semantic_id(task.documents)).result
    assert result is not None
    return [json.loads(line) for line in (result / "documents.jsonl").read_text().splitlines()]


def test_bits_per_byte_are_those_of_a_direct_computation(
    tiny_store: Store, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    (task,) = planned(tiny_store, tiny_corpus, ["bpb_base"], tmp_path)
    state = state_of(tiny_store, tiny_corpus.tokenizer)
    found, lines = scored(tiny_store, task, state)
    made = documents_of(tiny_store, task)
    adapter = adapter_of(tiny_store, tiny_corpus.tokenizer, "mamba2", context_tokens=64)
    adapter.model = eval_stage._loaded.model  # type: ignore[union-attr]
    requests = [Instance("loglikelihood_rolling", {}, (item["text"],), 0, metadata=("t", 0, 1)) for item in made]
    bits = [-logprob / math.log(2) for logprob in adapter.loglikelihood_rolling(requests)]
    size = sum(len(item["text"].encode()) for item in made)
    metric = found["metrics"]["bits_per_byte"]
    assert metric["value"] == pytest.approx(sum(bits) / size, rel=1e-12)
    assert metric["n"] == len(made) == len(lines) and metric["stderr"] > 0 and not metric["higher_is_better"]
    assert [line["item"] for line in lines] == [item["id"] for item in made]
    assert [line["bits_per_byte"] for line in lines] == [
        [value, float(len(item["text"].encode()))] for value, item in zip(bits, made, strict=True)
    ]


def test_the_unigram_baseline_counts_training_tokens(
    tiny_store: Store, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    (task,) = planned(tiny_store, tiny_corpus, ["bpb_base"], tmp_path)
    found, _ = scored(tiny_store, task, state_of(tiny_store, tiny_corpus.tokenizer))
    encoder = tokenizer.load(tiny_store, tiny_corpus.tokenizer)
    counts = tasks_stage.token_counts(tiny_store, sources_of(tiny_store, tiny_corpus)["base"].corpus)
    total = int(counts.sum()) + encoder.get_vocab_size() - 1
    bits = 0.0
    size = 0
    for item in documents_of(tiny_store, task):
        size += len(item["text"].encode())
        for id_ in encoder.encode(item["text"]).ids:
            bits -= math.log2(((counts[id_] if id_ < len(counts) else 0) + 1) / total)
    baseline = found["metrics"]["bits_per_byte"]["baseline"]
    assert baseline["name"].startswith("a unigram model")
    assert baseline["value"] == pytest.approx(bits / size)
    assert counts[EOD_ID] == 0


def test_what_is_scored_is_held_out(tiny_store: Store, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    encoder = tokenizer.load(tiny_store, tiny_corpus.tokenizer)
    for task in planned(tiny_store, tiny_corpus, ["bpb"], tmp_path):
        build(tiny_store, "tasks", task.documents or {}, tasks_stage.run, REQUEST)
        id_ = (task.documents or {})["corpus"]
        heldout = [document.text for document in corpus.read_heldout(tiny_store, id_)]
        result = corpus.result(tiny_store, id_)
        tokens = np.fromfile(result / "tokens.bin", dtype="<u2").tolist()
        offsets = np.fromfile(result / "offsets.bin", dtype="<i8").tolist()
        trained = {encoder.decode(tokens[start + 1 : end]) for start, end in pairwise(offsets)}
        assert len(trained) > 100
        for item in documents_of(tiny_store, task):
            assert any(item["text"] in text for text in heldout)
            assert item["text"] not in trained


def test_the_same_stage_makes_the_same_documents(tiny_store: Store, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    (task,) = planned(tiny_store, tiny_corpus, ["bpb_better"], tmp_path)
    semantic = task.documents or {}
    assert tasks_stage._build(tiny_store, semantic) == tasks_stage._build(tiny_store, semantic)


def test_results_have_the_same_bits_for_every_batch_size(
    tiny_store: Store, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    (task,) = planned(tiny_store, tiny_corpus, ["bpb_base"], tmp_path)
    state = state_of(tiny_store, tiny_corpus.tokenizer, "zamba2")
    _, lines = scored(tiny_store, task, state, batch_size=16)
    other = Store(tmp_path / "other")
    other.root.mkdir()
    for kind in ("tokenizer", "corpus", "tasks", "trajectory"):
        (other.root / kind).symlink_to(tiny_store.root / kind)
    eval_stage._loaded = None
    assert scored(other, task, state, batch_size=3)[1] == lines


def corpus_of_docstrings(store: Store, tokenizer_id: str) -> str:
    """A corpus stage's result with held-out docstrings, as zexp.data writes it."""
    semantic = {"source": {"kind": "embedded", "view": "high_quality"}, "tokenizer": tokenizer_id}
    folder = store.folder("corpus", semantic_id(semantic))
    draw = random.Random(3)
    words = ["ba", "ke", "lo", "mi", "tu", "dofa"]
    records = []
    for n in range(40):
        signature = f"def f{n}(a, b):"
        text = " ".join(draw.choices(words, k=20)) + "."
        digest = hashlib.sha256(text.encode()).hexdigest()
        record = {"file": f"m{n}.py", "text": f"{signature}\n{text}\n", "digest": digest}
        records.append({**record, "symbol": "function", "name": f"m.f{n}", "signature": signature})
    folder.create(semantic, {})
    attempt = folder.attempt({})
    assert attempt is not None
    with attempt:
        scratch = attempt.scratch("corpus")
        (scratch / "heldout.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        attempt.publish(scratch, "result")
    return folder.id


@pytest.fixture
def own_store(tiny_store: Store, tmp_path: Path) -> Store:
    """A store whose corpus folder is the test's own."""
    store = Store(tmp_path / "own")
    (store.root / "corpus").mkdir(parents=True)
    (store.root / "tokenizer").symlink_to(tiny_store.root / "tokenizer")
    return store


@pytest.mark.parametrize("name", ["docstring", "cloze"])
def test_a_choice_is_made_by_its_mutual_information_with_the_context(
    own_store: Store, tiny_corpus: TinyCorpus, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tiny tokenizer has no whole words; which words are one token is test_builders' matter.
    monkeypatch.setattr(tokenizer, "encode", _one_token_words(tokenizer.encode))
    id_ = corpus_of_docstrings(own_store, tiny_corpus.tokenizer)
    sources = {"high_quality": SourceInfo({"kind": "embedded", "view": "high_quality"}, id_)}
    (task,) = plan_tasks(
        {"tasks": [name]},
        sources=sources,
        tokenizer=tiny_corpus.tokenizer,
        seq_len=256,
        directory=tmp_path,
        cache=tmp_path,
    )
    found, lines = scored(own_store, task, state_of(own_store, tiny_corpus.tokenizer))
    made = documents_of(own_store, task)
    adapter = adapter_of(own_store, tiny_corpus.tokenizer, "mamba2", context_tokens=256)
    adapter.model = eval_stage._loaded.model  # type: ignore[union-attr]

    def log_p(context: str, choice: str) -> float:
        return adapter.loglikelihood([Instance("loglikelihood", {}, (context, choice), 0, metadata=("t", 0, 1))])[0][0]

    right = []
    for item in made:
        scores = []
        for choice, others in zip(item["choices"], item["others"], strict=True):
            given = [math.exp(log_p(context, choice)) for context in (item["context"], *others)]
            scores.append(math.log(given[0]) - math.log(sum(given) / len(given)))
        right.append(float(scores.index(max(scores)) == item["answer"]))
    assert [line["acc"] for line in lines] == right
    assert found["metrics"]["acc"]["value"] == pytest.approx(sum(right) / len(right))
    assert found["metrics"]["acc"]["chance"] == {"docstring": 1 / 2, "cloze": 1 / 4}[name]


def _one_token_words(encode: Any) -> Any:
    def encoded(encoder: Any, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = encode(encoder, texts)
        return [[1] for _ in texts] if len(texts) == 1 and texts[0].startswith(" ") and " " not in texts[0][1:] else ids

    return encoded


MINE = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: mine.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: " "
metric_list:
  - {metric: acc_mutual_info, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0, zexp: {report_as: {acc_mutual_info: acc}}}
"""


def test_a_task_of_ones_own_reads_its_files_and_mutual_information_is_as_by_hand(
    tiny_store: Store, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "mine.yaml").write_text(MINE)
    draw = random.Random(0)
    words = ["ba", "keli", "lofa", "mitu", "tu", "dofa"]
    rows = [
        {"question": " ".join(draw.choices(words, k=4)), "choices": draw.sample(words, 3), "answer": draw.randrange(3)}
        for _ in range(12)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = planned(tiny_store, tiny_corpus, ["mine"], tmp_path)
    found, lines = scored(tiny_store, task, state_of(tiny_store, tiny_corpus.tokenizer))
    adapter = adapter_of(tiny_store, tiny_corpus.tokenizer, "mamba2", context_tokens=64)
    adapter.model = eval_stage._loaded.model  # type: ignore[union-attr]

    def log_p(context: str, choice: str) -> float:
        return adapter.loglikelihood([Instance("loglikelihood", {}, (context, choice), 0, metadata=("t", 0, 1))])[0][0]

    right = []
    for row in rows:
        gains = [log_p(row["question"], f" {choice}") - log_p("", f" {choice}") for choice in row["choices"]]
        right.append(float(gains.index(max(gains)) == row["answer"]))
    assert [line["acc"] for line in lines] == right
    assert list(found["metrics"]) == ["acc"] and found["metrics"]["acc"]["n"] == 12


def test_a_data_file_that_changed_since_the_plan_is_refused(
    tiny_store: Store, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "mine.yaml").write_text(MINE)
    row = {"question": "ba", "choices": ["ke", "lo"], "answer": 0}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    (task,) = planned(tiny_store, tiny_corpus, ["mine"], tmp_path)
    (tmp_path / "mine.jsonl").write_text(json.dumps({**row, "answer": 1}) + "\n")
    with pytest.raises(StoreError, match="no longer the file that was planned with"):
        scored(tiny_store, task, state_of(tiny_store, tiny_corpus.tokenizer))


def test_a_limit_scores_the_first_documents(tiny_store: Store, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    (task,) = planned(tiny_store, tiny_corpus, ["bpb_base"], tmp_path, limit=3)
    found, lines = scored(tiny_store, task, state_of(tiny_store, tiny_corpus.tokenizer))
    assert found["metrics"]["bits_per_byte"]["n"] == 3
    assert [line["item"] for line in lines] == [item["id"] for item in documents_of(tiny_store, task)[:3]]


def test_a_source_without_held_out_text_is_said(own_store: Store, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    semantic = {"source": {"kind": "text"}, "tokenizer": tiny_corpus.tokenizer}
    folder = own_store.folder("corpus", semantic_id(semantic))
    folder.create(semantic, {})
    attempt = folder.attempt({})
    assert attempt is not None
    with attempt:
        scratch = attempt.scratch("corpus")
        (scratch / "heldout.jsonl").write_text("")
        attempt.publish(scratch, "result")
    sources = {"mine": SourceInfo({"kind": "text"}, folder.id)}
    (task,) = plan_tasks(
        {"tasks": ["bpb"]},
        sources=sources,
        tokenizer=tiny_corpus.tokenizer,
        seq_len=64,
        directory=tmp_path,
        cache=tmp_path,
    )
    with pytest.raises(ValueError, match="bpb_mine: none of the source's documents are held out"):
        build(own_store, "tasks", task.documents or {}, tasks_stage.run, REQUEST)
