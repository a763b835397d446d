import json
import subprocess
from datetime import datetime

import pytest

import zexp
from zexp.store import provenance as module
from zexp.store.provenance import provenance


def test_provenance_says_what_made_a_result():
    made = provenance()
    assert list(made) == ["zexp", "git", "python", "platform", "hostname", "packages", "time"]
    assert made["zexp"] == zexp.__version__
    assert made["packages"]["torch"].startswith("2.")
    assert datetime.fromisoformat(made["time"]).tzinfo is not None
    json.dumps(made, allow_nan=False)


@pytest.fixture
def checkout(tmp_path):
    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path), *arguments],
            check=True,
            capture_output=True,
        )

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    return tmp_path


def test_a_checkout_is_named_by_its_commit_and_whether_it_was_changed(checkout):
    clean = module._git(checkout)
    assert len(clean["sha"]) == 40 and clean["dirty"] is False
    (checkout / "untracked").write_text("")
    assert module._git(checkout) == clean
    (checkout / "a").write_text("2")
    assert module._git(checkout) == {**clean, "dirty": True}


def test_an_installed_package_and_a_broken_checkout_have_no_commit(tmp_path):
    assert module._git(tmp_path) is None
    (tmp_path / ".git").write_text("gitdir: nowhere")
    assert module._git(tmp_path) is None
