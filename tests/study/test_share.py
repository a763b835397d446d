"""A study as one file: the report is the same on another machine, and nothing there is trained from what is not there."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.report.synthetic import Study, make
from zexp import report
from zexp.config.errors import ConfigError
from zexp.report.status import read_stages
from zexp.store import archive, files, inventory
from zexp.store.errors import StoreError
from zexp.store.folder import Store
from zexp.study import recorded, share


def half(stage: dict) -> str:
    """One arm's evaluation failed, one anneal diverged, one was interrupted."""
    if stage["kind"] == "eval" and "cloze" in stage["label"] and int(stage["id"][0], 16) % 2:
        return "failed"
    if stage["label"].startswith("mamba2_tiny anneal"):
        return "diverged" if "control" in stage["label"] else "interrupted"
    return "done"


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make(Study(tmp_path_factory.mktemp("half") / "store", outcome=half, seeds=(0, 1)))


def carried(store: Store, tmp_path: Path, states: str = "none", into: Store | None = None) -> Store:
    there = into or Store(tmp_path / "there", patience=0.0)
    name = f"{states}.tar.gz"
    share.export(inventory.look(store), "invented", tmp_path / name, states)
    share.import_(there, tmp_path / name)
    return there


def texts(store: Store) -> dict[str, str]:
    paths = report.write(report.build(store.root, "invented"))
    return {suffix: path.read_text().replace(str(store.root), "STORE") for suffix, path in paths.items()}


@pytest.mark.parametrize("states", share.STATES)
@pytest.mark.parametrize("which", ["finished", "half_done"])
def test_the_report_of_an_imported_study_is_the_same_to_the_byte(request, which, states, tmp_path):
    store = request.getfixturevalue(which)
    there = carried(store, tmp_path, states)
    assert texts(there) == texts(store)
    again = carried(there, tmp_path / "again", states) if (tmp_path / "again").mkdir() is None else None
    assert again is not None and texts(again) == texts(store), "and so it is a machine further on"


@pytest.fixture
def finished(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make(Study(tmp_path_factory.mktemp("finished") / "store", archs=("transformer_tiny", "zamba2_tiny")))


def test_what_was_not_carried_is_told_but_nobody_takes_it_for_a_state(finished, tmp_path):
    there = carried(finished, tmp_path)
    stages = read_stages(there, recorded.read(there.study("invented"), "invented", current=True).listed["stages"])
    assert {stage.status for stage in stages.values()} == {"done"}
    look = inventory.look(there)
    for seen in look.stages.values():
        assert not seen.states and not (seen.folder.path / "states").exists()
        if seen.folder.kind == "trajectory":
            (tokens,) = seen.elsewhere
            assert seen.folder.state(tokens) is None and seen.folder.trainable(tokens) is None
            with pytest.raises(StoreError, match="never made, or it was removed"):
                seen.folder.required(f"states/{tokens}")
            with seen.folder.attempt({}) as attempt:  # it can be made there: nothing is in the way
                assert attempt.n == 2, "the first attempt was the other machine's"
                scratch = attempt.scratch("state")
                (scratch / "weights").write_text("1")
                assert attempt.publish(scratch, f"states/{tokens}")
        if seen.folder.kind == "packing":
            assert seen.folder.result is None and seen.folder.reported_result is not None


def test_ends_carry_weights_without_their_optimizer(finished, tmp_path):
    look = inventory.look(finished)
    for seen in look.stages.values():
        for tokens, state in seen.states.items():
            (state.path / "optimizer").mkdir()
            (state.path / "optimizer" / "o").write_bytes(b"123")
            (state.path / "weights").mkdir()
            (state.path / "weights" / "w").write_bytes(b"456")
            (state.path / "manifest.json").write_text('{"droppable": ["optimizer"]}')
            files.write_manifest(state.path)
            assert seen.folder.trainable(tokens)
    there = inventory.look(carried(finished, tmp_path, "ends"))
    ends = 0
    for seen in there.stages.values():
        for tokens, state in seen.states.items():
            ends += 1
            assert not state.trainable and (state.path / "weights/w").read_bytes() == b"456"
            files.verify_manifest(state.path)
            assert tokens in seen.pins, "a gc there keeps it"
    assert ends == 2 + 4, "two pretrained states, four anneals; a trunk's end is only told of"
    whole = inventory.look(carried(finished, tmp_path, "all", Store(tmp_path / "whole")))
    assert sum(len(seen.states) for seen in whole.stages.values()) == 2 + 2 + 4
    assert all(state.trainable for seen in whole.stages.values() for state in seen.states.values())


def test_what_is_here_stays_as_it_is_and_gets_what_it_lacks(finished, tmp_path):
    there = carried(finished, tmp_path)
    look = inventory.look(there)
    changed = next(seen for seen in look.stages.values() if seen.folder.kind == "eval")
    path = changed.folder.path / "result/results.json"
    path.write_text("mine")
    (changed.folder.path / "result/manifest.json").unlink()
    files.write_manifest(changed.folder.path / "result")
    share.export(inventory.look(finished), "invented", tmp_path / "whole.tar", "all")
    made = share.import_(there, tmp_path / "whole.tar")
    assert path.read_text() == "mine" and made.differs == [f"{changed.key}/result"]
    assert not made.new and f"{changed.key}" in made.kept
    trajectories = [seen for seen in look.stages.values() if seen.folder.kind == "trajectory"]
    assert all(seen.folder.states() for seen in trajectories), "the states came"
    assert {place for place in made.added if place.startswith("trajectory")} == {
        f"{seen.key}/states/{tokens}" for seen in trajectories for tokens in seen.elsewhere
    }


def test_another_study_of_the_name_is_refused_and_can_be_imported_under_a_name_of_its_own(finished, tmp_path):
    there = make(Study(tmp_path / "there", archs=("mamba2_tiny",)))
    share.export(inventory.look(finished), "invented", tmp_path / "a.tgz", "none")
    before = sorted(path for path in there.root.rglob("*") if "pins" not in path.parts)
    with pytest.raises(ConfigError, match="another study named 'invented'"):
        share.import_(there, tmp_path / "a.tgz")
    assert sorted(path for path in there.root.rglob("*") if "pins" not in path.parts) == before
    share.import_(there, tmp_path / "a.tgz", "theirs")
    assert recorded.names(there) == ["invented", "theirs"]
    assert report.build(there.root, "theirs").study == "theirs"
    with pytest.raises(ConfigError, match="cannot be a study's name"):
        share.import_(there, tmp_path / "a.tgz", "../x")


def test_a_stage_that_somebody_works_in_is_not_added_to(finished, tmp_path):
    there = carried(finished, tmp_path)
    share.export(inventory.look(finished), "invented", tmp_path / "whole.tar", "all")
    busy = next(seen.folder for seen in inventory.look(there).stages.values() if seen.folder.kind == "trajectory")
    with busy.attempt({}), pytest.raises(ConfigError, match=r"works in it\. Import again"):
        share.import_(there, tmp_path / "whole.tar")


def test_an_import_that_fails_leaves_nothing(finished, tmp_path):
    share.export(inventory.look(finished), "invented", tmp_path / "a.tar", "none")
    raw = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(raw[: len(raw) // 2])
    at = raw.index(b'"metrics"')
    (tmp_path / "bad.tar").write_bytes(raw[:at] + b'"mistics"' + raw[at + 9 :])
    there = Store(tmp_path / "there")
    for name, text in (("cut.tar", "cut off"), ("bad.tar", r"1 files have been altered; the first is eval/")):
        with pytest.raises(StoreError, match=text):
            share.import_(there, tmp_path / name)
        assert list(there.root.iterdir()) == []


def test_an_archive_replaces_no_file_and_appears_whole(finished, tmp_path):
    target = tmp_path / "a.tar.gz"
    with patch.object(archive, "_add_text", side_effect=[None, KeyboardInterrupt]), pytest.raises(KeyboardInterrupt):
        share.export(inventory.look(finished), "invented", target, "none")
    assert list(tmp_path.iterdir()) == []
    target.write_text("mine")
    with pytest.raises(ConfigError, match="there already"):
        share.export(inventory.look(finished), "invented", target, "none")
    assert target.read_text() == "mine"
    with pytest.raises(ConfigError, match="ends in"):
        share.export(inventory.look(finished), "invented", tmp_path / "a.tar.zst", "none")


def test_a_stage_whose_id_is_not_its_contents_is_refused(finished, tmp_path):
    look = inventory.look(finished)
    config = next(seen for seen in look.stages.values() if seen.folder.kind == "tokenizer").folder.path / "config.yaml"
    config.write_text(config.read_text().replace("tokenizer.bpe: 1", "tokenizer.bpe: 2"))
    share.export(inventory.look(finished), "invented", tmp_path / "a.tar", "none")
    with pytest.raises(StoreError, match="semantic block has the id"):
        share.import_(Store(tmp_path / "there"), tmp_path / "a.tar")


def crafted(path: Path, *members: tarfile.TarInfo, about: object = None) -> Path:
    with tarfile.open(path, "w") as tar:
        archive._add_text(tar, archive.ABOUT, about if about is not None else {"format": 1, "study": "x"})
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, link, 1 if kind == tarfile.REGTYPE else 0
    return made


EVAL = "eval/0123456789abcdef"


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (member("../outside"), "no file that a store has"),
        (member(f"{EVAL}/../../../outside"), "no file that a store has"),
        (member("/etc/passwd"), "no file that a store has"),
        (member("studies/../x"), "no file that a store has"),
        (member("studies/./x/y"), "no file that a store has"),
        (member("cache/files.json"), "no file that a store has"),
        (member(f"{EVAL}/a\\b"), "no file that a store has"),
        (member(f"{EVAL}/result", tarfile.SYMTYPE, "/etc"), "is a link"),
        (member(f"{EVAL}/result", tarfile.LNKTYPE, "/etc/passwd"), "is a link"),
        (member(f"{EVAL}/result", tarfile.FIFOTYPE), "no plain file"),
        (member(f"{EVAL}/result", tarfile.DIRTYPE), "no plain file"),
    ],
    ids=lambda value: re.sub(r"\W+", "_", getattr(value, "name", "")) or None,
)
def test_what_no_store_has_is_refused(bad, text, tmp_path):
    path = crafted(tmp_path / "a.tar", member(f"{EVAL}/config.yaml"), bad)
    there = tmp_path / "a" / "there"
    with pytest.raises(ConfigError, match=text):
        share.import_(Store(there), path)
    assert list(there.iterdir()) == [] and sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.tar"]


def test_members_that_are_there_twice_or_under_each_other_are_refused(tmp_path):
    twice = crafted(tmp_path / "a.tar", member(f"{EVAL}/x"), member(f"{EVAL}/x"))
    under = crafted(tmp_path / "b.tar", member(f"{EVAL}/x"), member(f"{EVAL}/x/y"))
    for path, text in ((twice, "in it twice"), (under, "a file and a folder")):
        with pytest.raises(ConfigError, match=text):
            share.import_(Store(tmp_path / "there"), path)


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "text.tar.gz").write_text("hello")
    for path, text in (
        (tmp_path / "text.tar.gz", "no archive"),
        (tmp_path / "missing.tar", "is not there"),
        (crafted(tmp_path / "old.tar", about={"format": 99}), "the format 99"),
        (crafted(tmp_path / "list.tar", about=[1]), "does not begin with"),
    ):
        with pytest.raises(ConfigError, match=text):
            share.import_(Store(tmp_path / "there"), path)
        assert not (tmp_path / "there").exists()


def test_the_same_study_makes_the_same_archive(finished, tmp_path):
    for name in "ab":
        share.export(inventory.look(finished), "invented", tmp_path / f"{name}.tar.gz", "none")
    one, other = (sorted(_contents(tmp_path / f"{name}.tar.gz")) for name in "ab")
    assert one == other
    names = [name for name, _ in one]
    assert not any(part in name for name in names for part in ("/report/", "lease.", "/tmp/", "/pins/"))


def _contents(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(m.name, (tar.extractfile(m) or io.BytesIO()).read()) for m in tar if m.name != archive.ABOUT]


def test_the_checksums_are_those_of_the_files(finished, tmp_path):
    share.export(inventory.look(finished), "invented", tmp_path / "a.tar", "all")
    found = dict(_contents(tmp_path / "a.tar"))
    listed = json.loads(found.pop(archive.CHECKSUMS))
    assert listed.keys() == found.keys() and len(found) > 20
    assert all(listed[name]["bytes"] == len(data) for name, data in found.items())
