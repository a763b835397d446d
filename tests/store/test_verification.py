"""Damage is found, said with what to do, and moved away only when asked to."""

import os

import pytest

from tests.store.test_inventory import state
from zexp.store import inventory, trash, verification


@pytest.fixture
def folder(make):
    made = make("trajectory", parent=None)
    with made.attempt({}) as attempt:
        state(attempt, 10)
        state(attempt, 20)
    return made


def checked(store, **options):
    look = inventory.look(store)
    return [(d.stage, d.place, d.problem) for d in verification.check(look, list(look.stages), **options)]


def test_what_is_whole_is_found_whole(store, folder):
    looked = []
    assert checked(store, on_bytes=looked.append) == []
    assert sum(looked) == verification.size_of(inventory.look(store), [str(folder)]) > 3000
    (folder.path / "states/10/optimizer/a").unlink()
    (folder.path / "states/10/optimizer").rmdir()
    assert checked(store) == [], "retention may have dropped it"


def test_an_altered_byte_is_found_by_checksums_and_a_shorter_file_by_its_size(store, folder):
    path = folder.path / "states/20/weights/a"
    path.write_bytes(b"y" + path.read_bytes()[1:])
    assert checked(store, contents=False) == []
    ((stage, place, problem),) = checked(store)
    assert (stage, place) == (str(folder), "states/20") and problem.startswith("weights/a has been altered")
    path.write_bytes(b"")
    ((_, _, problem),) = checked(store, contents=False)
    assert problem == "weights/a has 0 bytes, its manifest says 500."


def test_an_edited_config_and_a_parent_that_is_not_there_are_found(store, folder, make):
    child = make("trajectory", parent={"id": folder.id, "tokens": 20})
    with child.attempt({}) as attempt:
        state(attempt, 30)
    assert checked(store) == []
    os.rename(folder.path, folder.path.parent / "away")
    look = inventory.look(store)
    ((stage, place, problem),) = checked(store)
    assert stage == str(child) and f"forks from {folder} at 20 tokens, which is not in this store" in problem
    assert [d.stage for d in verification.strays(look)] == ["trajectory/away"]
    os.rename(folder.path.parent / "away", folder.path)
    config = child.path / "config.yaml"
    config.write_text(config.read_text().replace("tokens: 20", "tokens: 10"))
    ((stage, place, problem),) = checked(store)
    assert (stage, place) == (str(child), "config.yaml") and "it was edited" in problem


def test_a_folder_without_its_config_is_damage_if_something_is_published_in_it(store, folder, make):
    (make("eval").path / "config.yaml").unlink()
    assert list(verification.strays(inventory.look(store))) == [], "a run completes it"
    (folder.path / "config.yaml").unlink()
    (damage,) = verification.strays(inventory.look(store))
    assert damage.stage == str(folder) and damage.problem.startswith("config.yaml is missing") and not damage.movable


def test_what_is_damaged_is_set_aside_and_what_is_whole_is_not(store, folder):
    (folder.path / "states/20/weights/a").write_bytes(b"")
    assert not verification.set_aside(folder, "states/10")
    assert verification.set_aside(folder, "states/20")
    assert folder.states() == [10] and checked(store) == []
    (aside,) = inventory.look(store).stages[str(folder)].set_aside
    assert "damaged-states-20" in aside
    assert not verification.set_aside(folder, "states/20"), "it is gone"


def test_what_somebody_works_in_is_not_set_aside(store, folder):
    (folder.path / "states/20/weights/a").write_bytes(b"")
    with folder.attempt({}), pytest.raises(trash.Busy, match="works in it"):
        verification.set_aside(folder, "states/20")
    assert folder.states() == [10, 20]


def test_what_goes_while_it_is_looked_at_is_no_damage(store, folder):
    look = inventory.look(store)
    trash.delete(folder.path / "states/10")
    assert verification.check(look, list(look.stages)) == []
