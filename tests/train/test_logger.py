import os

import pytest

from tests.train.runs import chain, metrics, train
from zexp.store.ids import short
from zexp.train import logger

pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    # Whatever it might try to reach is not there.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def test_without_a_key_wandb_writes_offline_and_says_how_to_sync(tiny_store, tiny_corpus):
    (segment,) = chain(tiny_corpus, 3).segments
    train(tiny_store, segment, log_every=1, logger={"kind": "wandb", "project": "zexp", "entity": None})
    folder = tiny_store.folder("trajectory", segment.id)
    (directory,) = (folder.last_attempt().path / "wandb").glob("offline-run-*")
    assert directory.name.endswith(short(segment.id))
    assert f"wandb sync {directory}" in folder.last_attempt().log.read_text()
    assert logger.offline_runs(folder.path / "attempts") == [directory]
    (directory / f"run-{short(segment.id)}.wandb.synced").touch()
    assert logger.offline_runs(folder.path / "attempts") == []
    (file,) = directory.glob("*.wandb")
    raw = file.read_bytes()
    assert b"tokens_per_second" in raw and b"grad_norm" in raw and short(segment.id).encode() in raw
    assert len(metrics(folder)) == 3, "the JSONL is written as well"


def test_scores_are_added_to_the_run_of_the_trajectory(tmp_path):
    options = {"kind": "wandb", "project": "zexp", "entity": None}
    logger.send_scores(options, "0123456789abcdef", 4096, {"cloze/acc": 0.25}, tmp_path)
    (directory,) = (tmp_path / "wandb").glob("offline-run-*")
    assert directory.name.endswith("0123456789abcdef")
    assert b"cloze/acc" in next(directory.glob("*.wandb")).read_bytes()


def test_what_wandb_refuses_is_told_apart_from_a_mistake_of_ours(tmp_path):
    with pytest.raises(logger.NotSent, match="UsageError"):
        logger.send_scores({"kind": "wandb", "project": "a/b"}, "x", 4096, {"cloze/acc": 0.25}, tmp_path)


def test_a_key_or_an_explicit_mode_decides_where_it_goes(monkeypatch, tmp_path):
    assert logger.mode() == "offline"
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password abc\n")
    assert logger.mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert logger.mode() == "disabled"
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    assert logger.mode() == "online"


def test_an_unknown_logger_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"logger.kind = 'tensorboard'; one of: jsonl, wandb"):
        logger.open_curves({"kind": "tensorboard"}, "x", {}, tmp_path)
