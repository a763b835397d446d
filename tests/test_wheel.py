"""The built wheel in a virtual environment without a checkout, started from another folder."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent


def called(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "ZEXP_STORE", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**env, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that has the wheel; what zexp depends on is lent to it by this one."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    built = called(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, CHECKOUT, cwd=folder)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("zexp-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv/bin/python"
    (own,) = (folder / "venv/lib").glob("python*/site-packages")
    # A path line alone: the .pth files there, among them that of an editable zexp, are not read a second time.
    (own / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = called(*pip, "--python", python, "install", "--no-deps", "--force-reinstall", wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "venv/bin"


def test_the_package_is_the_installed_one(installed, tmp_path):
    done = called(installed / "python", "-c", "import zexp, hydra_plugins.zexp as p; print(zexp.__file__, p.__file__)", cwd=tmp_path)
    assert all(Path(file).is_relative_to(installed.parent) for file in done.stdout.split()), done.stdout + done.stderr


def test_it_carries_its_configs_studies_and_tasks(installed, tmp_path):
    done = called(installed / "zexp", "plan", "--json", "+sweeps=quickstart", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["variants"], plan["pretrainings"]) == (6, 3)
    tasks = {stage["label"].split()[-1] for stage in plan["stages"] if stage["kind"] == "eval"}
    assert tasks == {"bpb_base", "bpb_high_quality", "cloze", "docstring", "recall"}


def test_a_folder_of_ones_own_is_trained_from_scratch_to_its_leaderboard(installed, tmp_path):
    assert called(installed / "zexp", "init", "mine", cwd=tmp_path).returncode == 0
    done = called(installed / "zexp", "run", "+sweeps=mine", cwd=tmp_path / "mine")
    assert done.returncode == 0, done.stdout + done.stderr
    board = json.loads((tmp_path / "mine/store/studies/mine/report/leaderboard.json").read_text())
    assert [row["status"] for row in board["rows"]] == ["done"] * 3
