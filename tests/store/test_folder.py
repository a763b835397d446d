import json
import os
import time

import pytest

from zexp.config.errors import ConfigError
from zexp.store import folder as folders
from zexp.store.errors import StoreError
from zexp.store.files import read_yaml, write_yaml
from zexp.store.folder import Store
from zexp.store.ids import semantic_id


def publish(folder, target="result", text="1"):
    with folder.attempt({}) as attempt:
        scratch = attempt.scratch("new")
        (scratch / "x").write_text(text)
        attempt.publish(scratch, target)


# The store's own folder


@pytest.mark.parametrize("inside", ["", "store", "deeply/nested/store"])
def test_a_store_that_can_be_written_passes_and_nothing_is_left_behind(tmp_path, inside):
    Store(tmp_path / inside).check_writable()
    assert os.listdir(tmp_path) == []


def test_a_store_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(ConfigError) as caught:
            Store(path).check_writable()
        (problem,) = caught.value.problems
        assert f"store = '{path}': cannot write in '{tmp_path / 'file'}': Not a directory." in problem
        assert "store=DIR" in problem


def test_a_store_where_the_system_allows_no_folders_is_refused():
    with pytest.raises(ConfigError, match="cannot write in '/proc'"):
        Store("/proc/zexp/store").check_writable()


def test_a_store_behind_a_dangling_link_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    with pytest.raises(ConfigError, match="link"):
        Store(tmp_path / "link").check_writable()


def test_a_full_disk_is_refused_and_the_probe_removed(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.Path, "write_bytes", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        Store(tmp_path).check_writable()
    assert os.listdir(tmp_path) == []


def test_a_store_is_the_same_place_wherever_the_process_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("store")
    monkeypatch.chdir("/")
    assert store.root == tmp_path / "store"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store("~/x").root == tmp_path / "x"


def test_a_stage_folder_is_named_by_kind_and_sixteen_digits(store):
    folder = store.folder("packing", "0123456789abcdef" * 4)
    assert folder.path == store.root / "packing" / "0123456789abcdef"
    assert str(folder) == "packing/0123456789abcdef"
    assert not store.root.exists()
    with pytest.raises(ValueError, match="kind 'segment' is not one of tokenizer, corpus"):
        store.folder("segment", "0" * 64)
    with pytest.raises(ValueError, match="is not an id"):
        store.folder("eval", "0123456789abcdef")


# config.yaml


def test_a_folder_holds_its_config_and_provenance(store):
    semantic = {"parent": None, "lr": [{"start": 1e-05, "to": None}], "pattern": ("m", "gm"), "name": "1e-5"}
    folder = store.folder("trajectory", semantic_id(semantic))
    folder.create(semantic, {"zexp": "0.1.0"})
    assert read_yaml(folder.path / "config.yaml") == {
        "kind": "trajectory",
        "id": folder.id,
        "semantic": {**semantic, "pattern": ["m", "gm"]},
    }
    assert semantic_id(folder.semantic()) == folder.id
    assert folder.provenance() == {"zexp": "0.1.0"}


def test_it_is_written_once(make):
    folder = make(lr=0.5)
    before = os.stat(folder.path / "config.yaml").st_mtime_ns
    folder.create({"lr": 0.5}, {"zexp": "later"})
    assert folder.provenance() == {"zexp": "0.1.0"}
    assert os.stat(folder.path / "config.yaml").st_mtime_ns == before


def test_a_semantic_block_under_another_id_is_refused(store):
    folder = store.folder("eval", semantic_id({"lr": 0.5}))
    with pytest.raises(StoreError, match="this semantic block has the id"):
        folder.create({"lr": 0.25}, {})
    assert not folder.path.exists()


def test_an_edited_config_is_noticed_on_use(make):
    folder = make(lr=0.5, steps=1)
    write_yaml(folder.path / "config.yaml", {"kind": "eval", "id": folder.id, "semantic": {"lr": 0.5, "steps": 1.0}})
    with pytest.raises(StoreError, match="was it edited"):
        folder.create({"lr": 0.5, "steps": 1}, {})


def test_two_ids_that_agree_in_sixteen_digits_are_told_apart(make, store, monkeypatch):
    folder = make(lr=0.5)
    twin = store.folder("eval", folder.id[:16] + "0" * 48)
    assert twin.path == folder.path
    with pytest.raises(StoreError, match=f"is not the config of eval {twin.id}"):
        twin.semantic()
    monkeypatch.setattr(folders, "semantic_id", lambda semantic: twin.id)
    with pytest.raises(StoreError, match="is not the config"):
        twin.create({"lr": 0.25}, {})


@pytest.mark.parametrize("content", ["", "[]", "kind: eval\n", "{"])
def test_a_damaged_config_is_named(make, content):
    folder = make()
    (folder.path / "config.yaml").write_text(content)
    with pytest.raises(StoreError, match=r"config\.yaml"):
        folder.semantic()


def test_a_stage_that_is_not_there_says_so(store):
    with pytest.raises(StoreError, match="is not in this store"):
        store.folder("eval", "0" * 64).semantic()


# What is done


def test_an_empty_folder_has_nothing(store):
    folder = store.folder("trajectory", "0" * 64)
    assert folder.result is None and folder.state(1) is None and folder.states() == []
    assert folder.attempts() == [] and folder.last_attempt() is None
    assert folder.diverged() is None and folder.holder() is None and folder.pins() == []


def test_only_a_folder_with_a_manifest_is_published(make):
    folder = make("trajectory")
    publish(folder, "states/10")
    publish(folder, "states/9")
    (folder.path / "states" / "11").mkdir()
    (folder.path / "states" / "12.tmp").mkdir()
    assert folder.states() == [9, 10]
    assert folder.state(11) is None


def test_attempts_are_in_the_order_of_their_numbers(make):
    folder = make()
    for _ in range(11):
        with folder.attempt({}):
            pass
    (folder.path / "attempts" / ".DS_Store").touch()
    assert [attempt.n for attempt in folder.attempts()] == list(range(1, 12))
    assert folder.last_attempt().n == 11


def test_the_holder_is_shown_while_it_is_there(make):
    folder = make()
    with folder.attempt({}):
        holder = folder.holder()
        assert holder["pid"] == os.getpid() and holder["n"] == 1 and holder["silent_seconds"] < 60
    assert folder.holder() is None


def test_a_killed_holder_is_not_shown(make, start):
    folder = make()
    child = start(folder, "with folder().attempt({}): say(1); sys.stdin.readline()")
    child.read()
    assert folder.holder()["pid"] == child.pid
    child.process.kill()
    child.wait()
    assert folder.holder() is None


# Finding


def test_stages_are_found_by_any_prefix_of_their_id(make, store):
    folders = [make("eval", x=x) for x in range(20)] + [make("corpus", x=0)]
    first = folders[0]
    assert store.find(first.id) == store.find(first.id[:20]) == [folders[-1], first]  # one id, two kinds
    assert store.find(first.id[:16], "eval") == [first]
    assert store.find("") == [folders[-1], *sorted(folders[:20], key=lambda folder: folder.id)]
    assert list(store.folders("eval")) == sorted(folders[:20], key=lambda folder: folder.id)
    assert store.find("x") == [] and list(store.folders("tasks")) == []


def test_a_folder_without_a_config_is_not_a_stage_yet(make, store):
    folder = make()
    (folder.path / "config.yaml").unlink()
    (store.root / "eval" / ".DS_Store").touch()
    assert store.find("") == []


def test_a_folder_whose_config_belongs_elsewhere_is_named(make, store):
    folder = make()
    os.rename(folder.path, store.root / "eval" / ("0" * 16))
    with pytest.raises(StoreError, match=r"0000/config\.yaml has not the id"):
        store.find("")


# Waiting for parents


def test_what_is_there_is_not_waited_for(tmp_path, store, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waited"))
    assert store.wait_for(tmp_path) is True
    assert Store(store.root, patience=0).wait_for(tmp_path / "no" / "such") is False


def test_a_path_that_appears_later_is_seen(tmp_path, store, monkeypatch):
    path = tmp_path / "states" / "5"
    clock = [0.0]

    def sleep(seconds):
        clock[0] += seconds
        if clock[0] > 60:  # first the parent, then the path itself
            path.parent.mkdir(exist_ok=True)
        if clock[0] > 80:
            path.mkdir(exist_ok=True)

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", sleep)
    assert store.wait_for(path) is True
    assert 80 < clock[0] < 85


def test_a_path_that_never_appears_is_waited_for_ninety_seconds(tmp_path, store, monkeypatch):
    clock = [0.0]
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", sleep)
    assert store.wait_for(tmp_path / "x") is False
    assert clock[0] == pytest.approx(90)
    assert len(looks) < 60


def test_a_parent_that_has_to_be_there_is_named_with_what_to_do(make, store):
    folder = make("trajectory")
    impatient = Store(store.root, patience=0).folder("trajectory", folder.id)
    with pytest.raises(StoreError, match=r"has no states/5: .* It has states at: none\. Run the study again"):
        impatient.required("states/5")


def test_a_holder_on_another_machine_counts_as_gone_when_it_has_not_beaten_for_long(make):
    folder = make()
    timeout = folder.store.lease_times.timeout
    attempt = folder.attempt({})
    held = folder.path / f"lease.{attempt.n}"
    held.write_text(json.dumps({**json.loads(held.read_text()), "boot": "another", "host": "node3"}))
    os.utime(held, (time.time() - 3 * timeout,) * 2)
    assert folder.holder()["host"] == "node3", "clocks may differ"
    os.utime(held, (time.time() - 5 * timeout,) * 2)
    assert folder.holder() is None
