"""Published tokenizers: identity by content, their own end of a document, ids as they give them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.data.conftest import CONFIG
from zexp.config.errors import ConfigError
from zexp.data import published, recipe, tokenizer, windows
from zexp.store.errors import StoreError
from zexp.store.folder import Store
from zexp.store.ids import semantic_id

END = {"__type": "AddedToken", "content": "</s>", "special": True}
TEXT = "one and two make three\n" * 20 + "</s> is four characters\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    """<s> 0, </s> 2, ids with a gap, a bos that its template adds, truncation and padding that somebody left on."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.enable_truncation(4)
    made.enable_padding(length=4)
    target = tmp_path / "published"
    target.mkdir()
    content = json.loads(made.to_str())
    content["model"]["vocab"]["zzz"] = 999
    (target / "tokenizer.json").write_text(json.dumps(content))
    (target / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "bos_token": "<s>"}))
    return target


def config(**keys: object) -> dict[str, object]:
    return {**CONFIG, "tokenizer": {"kind": "hf", "path": "published", "eod": None, "weights": None, **keys}}


def semantic(tmp_path: Path, **keys: object) -> dict[str, object]:
    return recipe.tokenizer_semantic(config(**keys), {}, store_root=tmp_path / "store", directory=tmp_path)


def build(store: Store, made: dict, directory: Path, path: str = "published") -> Path:
    stage = store.folder("tokenizer", semantic_id(made))
    stage.create(made, {})
    request = {"directory": str(directory), "tokenizer": path}
    attempt = stage.attempt(request)
    assert attempt is not None
    with attempt:
        assert tokenizer.run(store, stage, request, attempt) == "done"
    return stage.required()


def test_its_id_is_its_content(folder, tmp_path):
    before = semantic(tmp_path)
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert semantic(tmp_path, path=str(tmp_path / "elsewhere")) == before
    assert before["vocab_size"] == recipe.vocab_size(config()["tokenizer"], tmp_path) == 1000
    assert before["eod_id"] == 2
    assert semantic(tmp_path, eod="<s>")["eod_id"] == 0
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
    after = semantic(tmp_path)
    assert after["eod_id"] == 0 and after["files"]["sha256"] != before["files"]["sha256"]


def test_a_corpus_is_in_its_ids(folder, store, tmp_path):
    made = semantic(tmp_path)
    result = build(store, made, tmp_path)
    info = json.loads((result / "info.json").read_text())
    assert (info["vocab_size"], info["eod_id"]) == (1000, 2) and info["used"] < 1000
    loaded = tokenizer.load(store, semantic_id(made))
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.no_truncation()
    plain.no_padding()
    text = "one and two make three"
    ids = tokenizer.encode(loaded, [text])[0]
    assert ids == plain.encode(text, add_special_tokens=False).ids and len(ids) > 0
    assert 2 not in tokenizer.encode(loaded, ["</s> is text"])[0], "what stands in a text is text"
    (tmp_path / "a.txt").write_text(TEXT)
    source = recipe.source_semantic(
        "mine", {"kind": "text", "files": "a.txt", "documents": "line"}, store_root=store.root, directory=tmp_path
    )
    from zexp.data import corpus, packing

    last = None
    for kind, handler, block in (
        ("corpus", corpus.run, recipe.corpus_semantic(config(), source, semantic_id(made))),
        ("packing", packing.run, None),
    ):
        block = block or recipe.packing_semantic(config(), last.id, 8)
        last = store.folder(kind, semantic_id(block))
        last.create(block, {})
        attempt = last.attempt({"directory": str(tmp_path)})
        with attempt:
            assert handler(store, last, {"directory": str(tmp_path)}, attempt) == "done"
    bins = windows.open(store, last.id)
    assert all(bins.tokens[at] == 2 for at in bins.offsets)


def test_what_goes_along_into_an_export(folder, store, tmp_path):
    made = semantic(tmp_path)
    build(store, made, tmp_path)
    exported = tokenizer.exported(store, semantic_id(made), 64)
    assert sorted(exported) == ["tokenizer.json", "tokenizer_config.json"]
    assert exported["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert json.loads(exported["tokenizer_config.json"]) == {**config, "bos_token": "</s>"}


@pytest.mark.parametrize("beside", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(("eod", "id_"), [(None, 2), ("<pad>", 1)], ids=["eos", "another"])
def test_its_ends_in_an_export_are_those_of_the_training(folder, store, tmp_path, beside, eod, id_):
    transformers = pytest.importorskip("transformers")
    (folder / "tokenizer_config.json").rename(folder / beside)
    made = semantic(tmp_path, eod=eod)
    build(store, made, tmp_path)
    target = tmp_path / "out"
    target.mkdir()
    for name, content in tokenizer.exported(store, semantic_id(made), 64).items():
        (target / name).write_bytes(content)
    (target / "config.json").write_text(json.dumps({"model_type": "llama"}))
    loaded = transformers.AutoTokenizer.from_pretrained(target)
    assert (loaded.bos_token_id, loaded.eos_token_id) == (id_, id_)
    assert loaded("one two", add_special_tokens=False)["input_ids"] == tokenizer.encode(
        tokenizer.load(store, semantic_id(made)), ["one two"]
    )[0]


def test_files_that_say_so_already_go_along_as_they_are():
    content = b'{"bos_token": {"content": "</s>"},  "eos_token": "</s>"}'
    assert published.with_ends(content, "</s>") == content


def test_files_that_have_changed_since_the_plan_are_refused(folder, store, tmp_path):
    made = semantic(tmp_path)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(StoreError, match="have changed since the plan"):
        build(store, made, tmp_path)
    shutil.rmtree(folder)
    with pytest.raises(StoreError, match="is not there any more"):
        build(store, made, tmp_path)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"path": None}, "corpus.tokenizer.path is not set"),
        ({"path": "nowhere"}, "corpus.tokenizer.path = nowhere: no such folder"),
        ({"path": "."}, "it has no tokenizer.json"),
        ({"eod": "<end>"}, "corpus.tokenizer.eod = '<end>' is no token of"),
        ({"weights": {"a": 1.0}}, "corpus.tokenizer.weights is set"),
    ],
)
def test_what_is_wrong_is_said(folder, tmp_path, keys, says):
    with pytest.raises(ConfigError, match="tokenizer") as caught:
        semantic(tmp_path, **keys)
    assert says in str(caught.value)


def test_a_folder_without_an_end_of_documents_asks_for_one(folder, tmp_path):
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"names an eos_token\. Say which token ends a document"):
        semantic(tmp_path)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert semantic(tmp_path)["eod_id"] == 2
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has no model\.vocab"):
        semantic(tmp_path)


def test_a_trained_one_reads_no_path():
    with pytest.raises(ConfigError, match=r"corpus\.tokenizer\.path is set, but kind: bpe does not read it"):
        recipe.tokenizer_semantic({**CONFIG, "tokenizer": {**CONFIG["tokenizer"], "path": "x"}}, {"mine": {}})


def test_an_embedding_needs_rows_up_to_the_highest_id(folder):
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.vocab_size(made) == 1000 > made.get_vocab_size()
