"""What lies in a store: every byte in one part, states with what can be dropped, folders that are no stages."""

import os

import pytest

from zexp.config.errors import ConfigError
from zexp.store import files, inventory, sizes
from zexp.store.folder import Store


def state(attempt, tokens, *, rolling=False, optimizer=1000):
    scratch = attempt.scratch("state")
    for part, size in (("weights", 500), ("optimizer", optimizer)):
        (scratch / part).mkdir()
        (scratch / part / "a").write_bytes(b"x" * size)
    files.write_json(scratch / "manifest.json", {"droppable": ["optimizer"]})
    attempt.publish(scratch, f"states/{tokens}", rolling=rolling)


def test_every_byte_is_in_one_part(make, store):
    folder = make("trajectory")
    with folder.attempt({"checkpoint": {"rolling": 3}, "logger": {"name": "tiny pretrain"}}) as attempt:
        state(attempt, 10)
        state(attempt, 20, rolling=True)
        attempt.metric(loss=1.0)
    (folder.path / "trash-x").mkdir()
    (folder.path / "trash-x" / "a").write_bytes(b"x" * 70)
    (folder.path / "attempts/1/tmp").mkdir()
    (folder.path / "attempts/1/tmp/a").write_bytes(b"x" * 30)
    (folder.path / "attempts/1/damaged-states-30-abcd").mkdir()
    (folder.path / "attempts/1/damaged-states-30-abcd/a").write_bytes(b"x" * 20)
    (folder.path / ".0123456789abcdef.tmp").write_bytes(b"x" * 5)
    seen = inventory.look(store).stages[str(folder)]
    walked = sum(os.lstat(os.path.join(parent, name)).st_size for parent, _, names in os.walk(folder.path) for name in names)
    assert seen.size.apparent == sizes.measure(folder.path).apparent == walked
    assert seen.size.disk == sizes.measure(folder.path).disk > 0
    assert {t: (s.optimizer.apparent, s.rolling, s.trainable, s.droppable) for t, s in seen.states.items()} == {
        10: (1000, False, True, True),
        20: (1000, True, True, True),
    }
    assert {path.rpartition("/")[2]: size.apparent for path, size in seen.leftovers.items()} == {
        "trash-x": 70, "tmp": 30, ".0123456789abcdef.tmp": 5,
    }  # fmt: skip
    assert [size.apparent for size in seen.set_aside.values()] == [20]
    assert (seen.keeps_rolling, seen.called, seen.holder, seen.failed) == (3, "tiny pretrain", None, False)


def test_a_file_of_two_names_takes_room_once(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 10)
    os.link(tmp_path / "a", tmp_path / "b")
    assert sizes.measure(tmp_path).apparent == 10
    assert sizes.measure(tmp_path / "nothing") == sizes.Size()


def test_a_sparse_file_takes_the_room_of_its_blocks(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        file.truncate(10_000_000)
    found = sizes.measure(tmp_path / "a")
    assert found.apparent == 10_000_000 and found.disk < 1_000_000


def test_what_is_made_from_what_is_read_from_the_semantic_blocks(make, store):
    tokenizer = make("tokenizer")
    corpus = make("corpus", tokenizer=tokenizer.id)
    packing = make("packing", corpus=corpus.id)
    root = make("trajectory", parent=None, tokenizer=tokenizer.id, streams=[{"packing": packing.id}])
    child = make("trajectory", parent={"id": root.id, "tokens": 5}, streams=[{"replay": root.id}])
    score = make("eval", state={"id": child.id, "tokens": 9}, other="f" * 64)
    make("eval", x=1)
    look = inventory.look(store)
    assert look.closure([str(score), "eval/not there"]) == {str(f) for f in (tokenizer, corpus, packing, root, child, score)}
    assert look.stages[str(child)].start == 5


def test_folders_that_are_no_stages_are_told_apart(make, store):
    good = make("eval")
    for name in ("0123456789abcdef", "notes"):
        (store.root / "eval" / name).mkdir()
    other = make("eval", x=1)
    os.rename(other.path, store.root / "eval" / "1123456789abcdef")
    look = inventory.look(store)
    assert list(look.stages) == [str(good)]
    problems = {stray.path.name: stray.problem for stray in look.strays}
    assert "is missing" in problems["0123456789abcdef"]
    assert "not the id" in problems["1123456789abcdef"]
    assert problems["notes"] == "its name is no id"


def test_there_is_no_store_to_look_at(tmp_path):
    with pytest.raises(ConfigError, match="is no folder"):
        inventory.look(Store(tmp_path / "nothing"))


def test_a_read_of_a_live_holder_and_of_a_failure(make, store):
    folder = make("eval")
    with pytest.raises(RuntimeError), folder.attempt({}):
        assert inventory.look(store).stages[str(folder)].holder["pid"] == os.getpid()
        raise RuntimeError("no")
    seen = inventory.look(store).stages[str(folder)]
    assert seen.failed and seen.holder is None and not seen.result
