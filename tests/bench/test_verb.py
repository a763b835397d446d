"""The verb: its parts, what it imports, what it refuses and completes."""

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

from tests.test_cli import zexp
from zexp.bench_verb import PARTS

HEAVY = "('torch', 'hydra', 'rich', 'matplotlib')"


@pytest.mark.parametrize("words", [["--help"], ["blocks", "--help"], ["step", "--help"], ["data", "--help"], ["size", "--help"]])
def test_help_answers_without_torch(words):
    code = f"""
import sys
from zexp.cli import main
try:
    main(['bench', *{words!r}])
finally:
    heavy = {HEAVY if words == ["--help"] else "('torch', 'matplotlib')"}
    print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stderr
    assert done.stdout.startswith(f"usage: zexp bench {'blocks|step|data|size|kernels' if words == ['--help'] else words[0]}")


def test_help_says_what_each_part_measures(tmp_path):
    shown = zexp("bench", "--help", cwd=tmp_path).stdout
    for name, entry in PARTS.items():
        assert name in shown and entry.text in shown
    assert "zexp bench blocks|step|data|size|kernels" in zexp("--help", cwd=tmp_path).stdout


@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_a_module_with_arguments_and_a_main(name):
    if find_spec(PARTS[name].module) is None:
        pytest.skip(f"{PARTS[name].module} is not there")
    part = import_module(PARTS[name].module)
    assert callable(part.add_arguments) and callable(part.main)
    assert part.__doc__


@pytest.mark.parametrize(("words", "said"), [([], "which part?"), (["blcks"], "Did you mean `zexp bench blocks`?"), (["x"], "There are blocks")])
def test_a_part_that_is_none_is_refused(tmp_path, words, said):
    done = zexp("bench", *words, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    ("line", "offered"),
    [("zexp ben", {"bench"}), ("zexp bench ", set(PARTS)), ("zexp bench s", {"step", "size"}), ("zexp bench blocks x", set())],
)
def test_the_shell_completes_the_parts(tmp_path, line, offered):
    done = zexp("-sc", "query=bash", cwd=tmp_path, COMP_LINE=line, COMP_POINT=str(len(line)))
    assert set(done.stdout.split()) == offered and done.stderr == ""


@pytest.mark.parametrize("part", ["step", "size"])
def test_the_shell_completes_overrides_behind_a_part(tmp_path, part):
    line = f"zexp bench {part} arch=zamba2_t"
    done = zexp("-sc", "query=bash", cwd=tmp_path, COMP_LINE=line, COMP_POINT=str(len(line)))
    assert "arch=zamba2_tiny" in done.stdout.split()


def test_overrides_and_several_configs_reach_a_part(tmp_path):
    words = ["--seconds", "0.1", "--json", "-m", "arch=mamba2_tiny,transformer_tiny", "phases.pretrain.batch_tokens=256"]
    done = zexp("bench", "step", *words, "seq_len=64", "execution.device=cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    import json

    assert [one["name"] for one in json.loads(done.stdout)["steps"]] == ["mamba2_tiny", "transformer_tiny"]
    assert list(tmp_path.iterdir()) == []


def test_hydra_refuses_what_is_no_key(tmp_path):
    done = zexp("bench", "step", "arch.widht=3", cwd=tmp_path)
    assert done.returncode == 2 and "widht" in done.stderr
