"""What `zexp calc` prints: tables that fit a terminal, architectures side by side, layouts; and the JSON's shape."""

import json

import pytest

from tests.test_cli import zexp


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    "words",
    [
        ["arch=jamba_v0p1", "seq_len=4096", "precision=bf16"],
        ["-m", "arch=zamba2_2p7b,llama3p2_1b", "seq_len=4096"],
        ["-m", "arch=transformer_10m,swa_10m,mamba2_10m,zamba2_10m,parallel_10m,moe_10m,nvidia_hybrid_8b"],
        ["budget", "-m", "gpus=8", "days=2.5", "device=a100", "arch=transformer_10m,swa_10m,mamba2_10m,zamba2_10m,parallel_10m"],
        ["-m", "arch=transformer_10m", "seq_len=256,1024"],
    ],
    ids=["one", "two", "many", "budget", "lengths"],
)
def test_tables_fit_the_terminal(words, columns, tmp_path):
    done = zexp("calc", *words, cwd=tmp_path, COLUMNS=str(columns))
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= columns
    assert "…" not in done.stdout


def test_architectures_stand_side_by_side(tmp_path):
    words = ("-m", "arch=zamba2_2p7b,llama3p2_1b", "seq_len=4096")
    lines = zexp("calc", *words, cwd=tmp_path, COLUMNS="80").stdout.splitlines()
    assert lines[0].startswith("Sequence length 4096")
    assert any(line.split() == ["zamba2_2p7b", "llama3p2_1b"] for line in lines)
    assert any(line.split() == ["KV/token", "184", "KB", "32.8", "KB"] for line in lines)
    found = json.loads(zexp("calc", "--json", *words, cwd=tmp_path).stdout)["architectures"]
    assert [one["name"] for one in found] == ["zamba2_2p7b", "llama3p2_1b"]


def test_rows_of_many_architectures_have_their_active_parameters_and_whole_names(tmp_path):
    names = ["transformer_10m", "qwen3_next_style", "nvidia_hybrid_8b", "jamba_v0p1"]
    words = ("-m", f"arch={','.join(names)}")
    lines = zexp("calc", *words, cwd=tmp_path, COLUMNS="80").stdout.splitlines()
    rows = {line.split()[0]: line.split()[1:5] for line in lines if line.split()[0] in names}
    assert list(rows) == names
    assert rows["jamba_v0p1"] == ["51.6", "B", "12.1", "B"]
    lines = zexp("calc", *words, "seq_len=1024,4096", cwd=tmp_path, COLUMNS="80").stdout.splitlines()
    assert any(line.startswith("qwen3_next_style") for line in lines) and max(map(len, lines)) <= 80


def test_the_json_has_the_promised_keys_and_its_blocks_sum_up(tmp_path):
    answer = json.loads(zexp("calc", "--json", "arch=jamba_10m", cwd=tmp_path).stdout)
    assert set(answer["parameters"]) == {"total", "active", "embedding"}
    assert set(answer["flops_per_token"]) == {"forward", "train", "train_recomputed"}
    assert {"weights", "gradients", "optimizer", "activations", "total"} <= set(answer["memory"]["training"])
    assert {"weights", "kv_bytes_per_token", "state_bytes", "contexts"} == set(answer["memory"]["inference"])
    for key, total in (
        ("parameters", answer["parameters"]["total"]),
        ("flops", answer["flops_per_token"]["forward"]),
        ("train_flops", answer["flops_per_token"]["train"]),
        ("kv_bytes", answer["memory"]["inference"]["kv_bytes_per_token"]),
        ("state_bytes", answer["memory"]["inference"]["state_bytes"]),
    ):
        assert sum(row[key] for row in answer["blocks"]) == total


def test_calc_counts_layouts_that_a_training_refuses(tmp_path):
    words = ["parallelism.data=8", "parallelism.zero=1", "parallelism.activation_checkpointing=full"]
    done = zexp("calc", "arch=transformer_10m", *words, cwd=tmp_path)
    assert done.returncode == 0 and "8 devices, ZeRO-1, activations computed again" in done.stdout
    for verb in ("plan", "run"):
        done = zexp(verb, *words, cwd=tmp_path)
        assert done.returncode == 2
        assert "parallelism.zero = 1: a training does without it so far" in done.stderr
        assert "activation_checkpointing" not in done.stderr, "which a training has"
    assert not (tmp_path / "store/trajectory").exists()


def test_all_of_calcs_mistakes_are_reported_together(tmp_path):
    words = ["arch=transformer_10m", "seq_len=0", "execution.micro_batch=0", "precision=fp8", "parallelism.tensor=3"]
    done = zexp("calc", *words, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for text in ("seq_len = 0", "execution.micro_batch = 0", "precision = 'fp8'", "parallelism.tensor = 3", "heads = 4"):
        assert text in done.stderr
