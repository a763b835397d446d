"""What of a command goes on in the background, and what the person is told."""

from __future__ import annotations

import pytest

from tests.composed import config
from zexp.store.folder import Store
from zexp.store.process import this_process
from zexp.study import execute
from zexp.study.launch import detach, driver
from zexp.study.resolve import Composed


@pytest.mark.parametrize("word", ["detach=true", "+detach=true", "++detach=false", "~detach", "detach="])
def test_the_key_is_known_however_it_is_written(word):
    assert detach.is_key(word)


@pytest.mark.parametrize("word", ["study.detach=true", "detached=true", "arch=detach", "-m", "~detach.x"])
def test_other_words_are_other_words(word):
    assert not detach.is_key(word)


def test_the_way_back_names_the_store_where_it_is_not_the_usual_one(tmp_path, monkeypatch):
    store = Store(tmp_path / "a store")
    record = driver.record(store, "mine", ["run"], process=this_process(), log=store.study("mine") / driver.LOG)
    monkeypatch.setenv("ZEXP_STORE", str(store.root))
    assert "zexp cancel mine   " in detach.how_to_come_back(store, "mine", record)
    monkeypatch.delenv("ZEXP_STORE")
    assert f"zexp cancel mine --store '{store.root}'   " in detach.how_to_come_back(store, "mine", record)


def test_a_run_has_the_same_name_in_the_background():
    both = [Composed(config(*words), {}, {}, ["seed=1", *words]) for words in ([], ["detach=true"])]
    assert execute._study(both[:1], [])["name"] == execute._study(both[1:], [])["name"]
