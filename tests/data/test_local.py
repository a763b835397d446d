"""Sources in files: what is read, what is refused and how it is said, what is cached."""

import json

import polars
import pytest

from tests.data.conftest import write_lines
from zexp.config.errors import ConfigError
from zexp.data import local, recipe


def texts(source, tmp_path):
    return [text for row in source["files"] for text in local.read(source, tmp_path / row["name"])]


def test_text_is_one_document_a_file_a_line_or_a_paragraph(source, tmp_path):
    (tmp_path / "b.txt").write_bytes("\ufeffone\r\ntwo\r\n\r\n \n three\n\n\n".encode())
    (tmp_path / "a.txt").write_text("ä")
    expected = {
        "file": ["ä", "one\ntwo\n\n \n three\n\n\n"],
        "line": ["ä", "one", "two", " three"],
        "paragraph": ["ä", "one\ntwo\n", " three\n"],
    }
    for documents, found in expected.items():
        made = source(kind="text", files="*.txt", documents=documents)
        assert texts(made, tmp_path) == found
        assert made["counts"] == {"documents": len(found), "bytes": sum(len(t.encode()) for t in found)}
    assert source(kind="text", files="*.txt") == source(kind="text", files=["b.txt", "*.txt"], documents="file")


def test_json_lines_and_parquet_give_the_texts_of_their_key(source, tmp_path):
    rows = [{"text": "one", "body": "eins"}, {"text": "two\n", "body": "zwei"}, {"text": "", "body": "drei"}]
    write_lines(tmp_path / "a.jsonl", [json.dumps(row) for row in rows] + ["  "])
    polars.DataFrame([*rows, {"text": None, "body": "vier"}]).write_parquet(tmp_path / "a.parquet")
    for kind in ("jsonl", "parquet"):
        assert texts(source(kind=kind, files=f"a.{kind}"), tmp_path) == ["one", "two\n"]
        assert texts(source(kind=kind, files=f"a.{kind}", text_key="body"), tmp_path)[:3] == ["eins", "zwei", "drei"]


def test_the_fingerprint_is_of_names_sizes_and_contents(source, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    first = source(kind="text", files="a.txt")
    assert first["files"] == [{
        "name": "a.txt", "bytes": 4, "sha256": "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1",
    }]  # fmt: skip
    assert source(kind="text", files="./*.txt") == first
    (tmp_path / "a.txt").write_text("Text")
    assert source(kind="text", files="a.txt") != first


def test_a_second_plan_reads_no_text(source, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    write_lines(path, ['{"text": "one"}'])
    first = source(kind="jsonl", files="a.jsonl")

    def refuse(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(local, "read", refuse)
    assert source(kind="jsonl", files="a.jsonl") == first
    with pytest.raises(AssertionError, match="read again"):
        source(kind="jsonl", files="a.jsonl", text_key="body")


@pytest.mark.parametrize(
    ("content", "keys", "text"),
    [
        (None, {"kind": "text", "files": "no/*.txt"},
         "corpus.sources.mine.files: no file matches 'no/*.txt' in {dir} ({dir}/no is not there). Correct the path."),
        (None, {"kind": "text", "files": []},
         "corpus.sources.mine.files = []: name files, e.g. files: texts/*.txt, or a list of such names."),
        (None, {"kind": "text"},
         "corpus.sources.mine.files = None: name files, e.g. files: texts/*.txt, or a list of such names."),
        (b"a", {"kind": "text", "files": "f", "documents": "page"},
         "corpus.sources.mine.documents = 'page': one document is a file, a line, a paragraph. Set one of these."),
        (b" \n\n", {"kind": "text", "files": "f"},
         "corpus.sources.mine: there is no text in its 1 file(s), f. Put some in."),
        (b"fine\nnot \xe4 fine\n", {"kind": "text", "files": "f"},
         "corpus.sources.mine: f, line 2 is not UTF-8: byte 0xe4 at position 5. Convert the file (iconv -t UTF-8)."),
        (b'{"text": "a"}\n{"text": \n', {"kind": "jsonl", "files": "f"},
         "corpus.sources.mine: f, line 2 is no JSON: Expecting value at column 9."),
        (b'{"body": "a", "id": 1}\n', {"kind": "jsonl", "files": "f"},
         "corpus.sources.mine: f, line 1 has no key 'text'; it has body, id. Set text_key."),
        (b'["a"]\n', {"kind": "jsonl", "files": "f"},
         "corpus.sources.mine: f, line 1 is a JSON array; each line must be an object."),
        (b'{"text": null}\n', {"kind": "jsonl", "files": "f"},
         "corpus.sources.mine: f, line 1: 'text' is a JSON null, not a string."),
        (b'{"text": "\\ud83d"}\n', {"kind": "jsonl", "files": "f"},
         "corpus.sources.mine: f, line 1: 'text' has half of a surrogate pair, which is no text."),
        ({"body": ["a"], "n": [1]}, {"kind": "parquet", "files": "f"},
         "corpus.sources.mine: f has no column 'text'; it has body, n. Set text_key."),
        ({"text": [1]}, {"kind": "parquet", "files": "f"},
         "corpus.sources.mine: f: its column 'text' is Int64, not String."),
        (b"text", {"kind": "parquet", "files": "f"}, "corpus.sources.mine: f is no Parquet file that can be read: "),
        (b"a", {"kind": "csv", "files": "f"},
         "corpus.sources.mine.kind = 'csv': a source is embedded, text, jsonl, parquet. Set one of these."),
        (b"a", {"kind": "text", "files": "f", "text_key": "a"},
         "corpus.sources.mine.text_key is set, but a source of kind text does not read it (it reads files, documents). "
         "Take it out."),
        (b"a", {"kind": "text", "files": "f", "max_bytes": 0},
         "corpus.sources.mine.max_bytes is 0, which leaves nothing. Give a number, or null for all."),
        (None, {"kind": "embedded", "view": "low_quality"},
         "corpus.sources.mine.view = 'low_quality': an embedded source has the views base and high_quality. "
         "Set corpus.sources.mine.view to one of them."),
        (None, {"kind": "embedded", "view": "base", "packages": ["numpy", "topics"]},
         "corpus.sources.mine.packages: 'topics' is not among what the view base has: stdlib, numpy, scipy."),
    ],
)
def test_a_bad_source_is_refused_at_plan_time(source, tmp_path, content, keys, text):
    if isinstance(content, bytes):
        (tmp_path / "f").write_bytes(content)
    elif content is not None:
        polars.DataFrame(content).write_parquet(tmp_path / "f")
    with pytest.raises(ConfigError) as caught:
        source(**keys)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(text.replace("{dir}", str(tmp_path)))


def test_every_bad_file_is_named_at_once(source, tmp_path):
    write_lines(tmp_path / "a.jsonl", ["1"])
    write_lines(tmp_path / "b.jsonl", ["{}"])
    with pytest.raises(ConfigError) as caught:
        source(kind="jsonl", files="*.jsonl")
    assert [problem.split(",")[0] for problem in caught.value.problems] == [
        "corpus.sources.mine: a.jsonl", "corpus.sources.mine: b.jsonl",
    ]  # fmt: skip


def test_the_bound_is_above_the_tokens(source, tmp_path):
    write_lines(tmp_path / "a.txt", ["one", "two", "ä"])
    made = source(kind="text", files="a.txt", documents="line")
    assert recipe.tokens_bound(made) == 3 + 3 + 2 + 3
    assert recipe.tokens_bound(source(kind="text", files="a.txt", documents="line", max_bytes=4)) == 8
