import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import zexp
from zexp.store import files
from zexp.store.errors import StoreError
from zexp.store.ids import canonical_json, round12

REPOSITORY = str(Path(zexp.__file__).parent.parent)
KILLED_IN = """
import os, signal, sys
from pathlib import Path
from zexp.store import files
def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
module, name = sys.argv[2].split(".")
setattr({"os": os, "files": files}[module], name, die)
"""


def killed(call: str, code: str, path: Path) -> None:
    """Run code in a process that is killed when it comes to call."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED_IN + code, str(path), call], env={**os.environ, "PYTHONPATH": REPOSITORY}
    )
    assert done.returncode == -9


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("before", [None, '{"a": 1}\n'])
def test_a_file_whose_writer_was_killed_is_as_it_was(tmp_path, call, before):
    path = tmp_path / "x.json"
    if before is not None:
        path.write_text(before)
    killed(call, "files.write_json(Path(sys.argv[1]), {'b': 2})", path)
    assert (path.read_text() if path.exists() else None) == before


def test_a_file_whose_writer_was_killed_after_the_rename_is_new(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    killed("files.sync_folder", "files.write_json(Path(sys.argv[1]), {'b': 2})", path)
    assert files.read_json(path) == {"b": 2}


@pytest.mark.parametrize("sync", [True, False])
def test_a_write_that_fails_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, sync):
    path = tmp_path / "x"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, "new", sync=sync)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_readers_see_whole_files_only(tmp_path):
    path = tmp_path / "x.json"
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import itertools, sys; from pathlib import Path; from zexp.store import files\n"
            "for i in itertools.count(): files.write_json(Path(sys.argv[1]), [i] * 20000, sync=False)",
            str(path),
        ],
        env={**os.environ, "PYTHONPATH": REPOSITORY},
    )
    try:
        seen = set()
        while len(seen) < 20:
            if path.exists():
                rows = files.read_json(path)
                assert len(rows) == 20000 and len(set(rows)) == 1
                seen.add(rows[0])
            assert writer.poll() is None
    finally:
        writer.kill()
        writer.wait()


def test_a_new_file_has_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o002)  # a group that shares a store
    try:
        files.write_atomic(tmp_path / "x", b"1")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o664


def test_the_longest_file_name_can_be_written(tmp_path):
    files.write_atomic(tmp_path / ("x" * 255), "1")
    assert os.listdir(tmp_path) == ["x" * 255]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_json_refuses_what_is_not_json(tmp_path, bad):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "x.json", {"loss": bad})
    assert os.listdir(tmp_path) == []


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "x").write_text("{'a': [")
    with pytest.raises(StoreError, match="x is not readable JSON"):
        files.read_json(tmp_path / "x")
    with pytest.raises(StoreError, match="x is not readable YAML"):
        files.read_yaml(tmp_path / "x")


text = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["1e-5", "1.0", "01", "no", "on", "~", "null", "2024-01-01", "1:30", "=", "<<", "0x10", "1_000", "- a", "#", "\x85"]
)
leaves = (
    st.none() | st.booleans() | st.integers() | text | st.floats(allow_nan=False, allow_infinity=False).map(round12)
)
trees = st.recursive(leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(text, x, max_size=3), max_leaves=6)


@given(trees)
def test_yaml_reads_back_as_the_same_config(tmp_path_factory, obj):
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    files.write_yaml(path, obj)
    assert canonical_json(files.read_yaml(path)) == canonical_json(obj)
    # The same with PyYAML's own reader: nothing depends on libyaml being there.
    assert canonical_json(yaml.safe_load(path.read_text())) == canonical_json(obj)


def test_yaml_writes_a_list_that_is_used_twice_out_twice(tmp_path):
    shared = [1, 2]
    files.write_yaml(tmp_path / "x.yaml", {"a": shared, "b": shared})
    assert (tmp_path / "x.yaml").read_text() == "a: [1, 2]\nb: [1, 2]\n"


def folder_with(path: Path, **texts: str) -> Path:
    path.mkdir(parents=True)
    for name, content in texts.items():
        file = path / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return path


def test_publishing_moves_the_whole_folder(tmp_path):
    source = folder_with(tmp_path / "attempts" / "s", a="1", sub__b="2")
    assert files.publish(source, tmp_path / "states" / "5") is True
    assert not source.exists()
    assert (tmp_path / "states" / "5" / "sub" / "b").read_text() == "2"


def test_the_first_to_publish_wins_and_the_second_is_told(tmp_path):
    first, second = folder_with(tmp_path / "1", a="first"), folder_with(tmp_path / "2", a="second")
    assert files.publish(first, tmp_path / "result") is True
    assert files.publish(second, tmp_path / "result") is False
    assert (tmp_path / "result" / "a").read_text() == "first"
    assert (second / "a").read_text() == "second"


def test_who_is_overtaken_between_the_look_and_the_rename_loses_all_the_same(tmp_path):
    first, second = folder_with(tmp_path / "1", a="first"), folder_with(tmp_path / "2", a="second")

    def overtake():
        assert files.publish(second, tmp_path / "result") is True

    assert files.publish(first, tmp_path / "result", before_rename=overtake) is False
    assert (tmp_path / "result" / "a").read_text() == "second"


def test_publishing_stops_where_the_last_look_says_so(tmp_path):
    source = folder_with(tmp_path / "1", a="1")

    def lost():
        raise StoreError("lost")

    with pytest.raises(StoreError, match="lost"):
        files.publish(source, tmp_path / "result", before_rename=lost)
    assert not (tmp_path / "result").exists()


def test_everything_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    source = folder_with(tmp_path / "1", a="1", sub__b="2")
    events: list[str] = []
    real_open, real_rename = os.open, os.rename
    names: dict[int, str] = {}

    def opened(path, *args, **kwargs):
        descriptor = real_open(path, *args, **kwargs)
        names[descriptor] = os.path.relpath(path, tmp_path)
        return descriptor

    def renamed(*args):
        events.append("rename")
        real_rename(*args)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(names[descriptor]))
    monkeypatch.setattr(os, "rename", renamed)
    files.publish(source, tmp_path / "result")
    assert set(events[: events.index("rename")]) == {"1/a", "1/sub/b", "1/sub", "1"}
    assert events[events.index("rename") + 1 :] == [".", "."]


def test_a_rename_that_an_nfs_client_repeated_has_succeeded(tmp_path, monkeypatch):
    source = folder_with(tmp_path / "1", a="1")
    real = os.rename

    def repeated(a, b):
        real(a, b)
        real(a, b)

    monkeypatch.setattr(os, "rename", repeated)
    assert files.publish(source, tmp_path / "result") is True


def test_other_errors_of_the_rename_come_out(tmp_path):
    source = folder_with(tmp_path / "1", a="1")
    (tmp_path / "result").write_text("a file")
    with pytest.raises(NotADirectoryError):
        files.publish(source, tmp_path / "result")


def published(tmp_path: Path) -> Path:
    folder = folder_with(tmp_path / "result", a="1234", sub__b="5678")
    files.write_json(folder / "manifest.json", {"tokens": 7})
    files.write_manifest(folder)
    return folder


def test_the_manifest_keeps_its_makers_keys_and_lists_every_file_but_itself(tmp_path):
    folder = published(tmp_path)
    manifest = files.read_json(folder / "manifest.json")
    assert manifest["tokens"] == 7
    assert list(manifest["files"]) == ["a", "sub/b"]
    assert manifest["files"]["a"] == {"bytes": 4, "sha256": files.sha256_file(folder / "a")}
    files.verify_manifest(folder)


def truncate(path):
    os.truncate(path, 3)


def alter(path):
    path.write_text("1235")


def remove(path):
    path.unlink()


@pytest.mark.parametrize("name", ["a", "sub/b"])
@pytest.mark.parametrize(
    "harm, says", [(truncate, "has 3 bytes, its manifest says 4"), (alter, "has been altered"), (remove, "is missing")]
)
def test_verification_names_the_file_that_is_not_as_it_was(tmp_path, name, harm, says):
    folder = published(tmp_path)
    harm(folder / name)
    with pytest.raises(StoreError, match=f"/{name} {says}"):
        files.verify_manifest(folder)


def test_verification_names_all_bad_files_at_once(tmp_path):
    folder = published(tmp_path)
    truncate(folder / "a")
    remove(folder / "sub/b")
    with pytest.raises(StoreError, match=r"/a has 3 bytes.*; .*/b is missing"):
        files.verify_manifest(folder)


def test_the_quick_verification_looks_at_sizes_only(tmp_path):
    folder = published(tmp_path)
    alter(folder / "a")
    files.verify_manifest(folder, contents=False)
    truncate(folder / "a")
    with pytest.raises(StoreError, match="3 bytes"):
        files.verify_manifest(folder, contents=False)


@pytest.mark.parametrize("content", [None, "", '{"files"', "[]", '{"tokens": 1}'])
def test_a_damaged_manifest_is_named_itself(tmp_path, content):
    folder = published(tmp_path)
    (folder / "manifest.json").unlink()
    if content is not None:
        (folder / "manifest.json").write_text(content)
    with pytest.raises(StoreError, match=r"manifest\.json"):
        files.verify_manifest(folder)


def test_a_makers_manifest_may_not_claim_checksums(tmp_path):
    folder = folder_with(tmp_path / "s", **{"manifest.json": json.dumps({"files": {}})})
    with pytest.raises(StoreError, match="without 'files'"):
        files.write_manifest(folder)


def test_links_and_pipes_are_not_published(tmp_path):
    folder = folder_with(tmp_path / "s", a="1")
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(StoreError, match="link is a link"):
        files.checksums(folder)
    (folder / "link").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(StoreError, match="pipe is neither"):
        files.checksums(folder)
