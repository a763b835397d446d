import os
import time
from pathlib import Path

import pytest

from zexp.store import files
from zexp.store.errors import StoreError
from zexp.store.fingerprint import DigestCache, file_fingerprint

LONG_AGO = 1_600_000_000


def write(path: Path, text: str, *, mtime: float = LONG_AGO) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (mtime, mtime))
    return path


def of(paths, base, cache):
    """The fingerprint of files named relative to base."""
    return file_fingerprint([(path.relative_to(base).as_posix(), path) for path in paths], cache)


@pytest.fixture
def reads(monkeypatch):
    """The files whose contents were read."""
    seen: list[str] = []
    real = files.sha256_file

    def counted(path):
        seen.append(Path(path).name)
        return real(path)

    monkeypatch.setattr(files, "sha256_file", counted)
    return seen


def test_a_fingerprint_depends_on_names_and_contents_alone(tmp_path):
    def at(base, **texts):
        paths = [write(tmp_path / base / name, text) for name, text in texts.items()]
        return of(paths, tmp_path / base, DigestCache(None))

    one = at("one", a="1", b="22")
    assert (one["files"], one["bytes"]) == (2, 3)
    assert at("two", b="22", a="1") == one
    assert at("three", a="1", b="23") != one
    assert at("four", a="1", c="22") != one
    assert at("five", a="12", b="2") != one


def test_the_fingerprint_is_pinned(tmp_path):
    # A change here gives every corpus made from files a new id.
    path = write(tmp_path / "sub" / "a.txt", "hello\n")
    assert of([path], tmp_path, DigestCache(None)) == {
        "files": 1,
        "bytes": 6,
        "sha256": "24350a80a366edef948364e36f2c9e6f6be8db7a6cf6a85a3580972ba942a066",
    }


def test_a_second_plan_reads_no_file(tmp_path, reads):
    paths = [write(tmp_path / name, name) for name in "abc"]
    first = of(paths, tmp_path, DigestCache(tmp_path / "cache" / "files.json"))
    assert sorted(reads) == ["a", "b", "c"]
    reads.clear()
    assert of(paths, tmp_path, DigestCache(tmp_path / "cache" / "files.json")) == first
    assert reads == []


def edited(path):
    write(path, "B", mtime=LONG_AGO + 1)


def longer(path):
    write(path, "bb")


def replaced(path):
    write(path.with_name("new"), "B").rename(path)


@pytest.mark.parametrize("change", [edited, longer, replaced], ids=["mtime", "size", "inode"])
def test_a_file_that_changed_is_read_again(tmp_path, reads, change):
    path = write(tmp_path / "b", "b")
    cache = tmp_path / "files.json"
    before = of([path], tmp_path, DigestCache(cache))
    change(path)
    assert of([path], tmp_path, DigestCache(cache)) != before
    assert reads == ["b", "b"]


def test_a_file_written_just_now_is_not_cached(tmp_path, reads):
    path = write(tmp_path / "b", "b", mtime=time.time())
    for _ in range(2):
        of([path], tmp_path, DigestCache(tmp_path / "files.json"))
    assert reads == ["b", "b"]


def test_a_file_that_changes_while_it_is_read_has_no_fingerprint(tmp_path, monkeypatch):
    path = write(tmp_path / "b", "b")
    real = files.sha256_file

    def read(name):
        digest = real(name)
        write(path, "bb")
        return digest

    monkeypatch.setattr(files, "sha256_file", read)
    with pytest.raises(StoreError, match="b changed while it was read"):
        of([path], tmp_path, DigestCache(None))


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_cache_is_no_cache(tmp_path, content):
    path = write(tmp_path / "b", "b")
    cache = write(tmp_path / "files.json", content)
    expected = of([path], tmp_path, DigestCache(None))
    assert of([path], tmp_path, DigestCache(cache)) == expected
    assert str(path) in files.read_json(cache)


def test_a_store_that_cannot_be_written_only_costs_the_cache(tmp_path):
    path = write(tmp_path / "b", "b")
    blocked = DigestCache(path / "cache" / "files.json")
    assert of([path], tmp_path, blocked)["files"] == 1


def test_two_processes_keep_each_others_digests(tmp_path):
    a, b = write(tmp_path / "a", "a"), write(tmp_path / "b", "b")
    one, two = DigestCache(tmp_path / "files.json"), DigestCache(tmp_path / "files.json")
    one.sha256(a)
    two.sha256(b)
    one.save()
    two.save()
    assert set(files.read_json(tmp_path / "files.json")) == {str(a), str(b)}
