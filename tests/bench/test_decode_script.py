"""benchmarks/decode.py: what it writes of a tiny model on both sides, and what it refuses. Its times mean nothing here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "decode.py"
pytest.importorskip("transformers")


def ran(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_both_sides_generate_the_same_and_their_seconds_are_set_against_each_other(tmp_path):
    out = tmp_path / "decode.json"
    sizes = ("--context", "9", "--tokens", "3", "--rounds", "1", "--threads", "1")
    made = ran("--json", "--models", "zamba2", *sizes, "--out", str(out))
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout)
    assert found == json.loads(out.read_text())
    assert (found["context"], found["tokens"], found["threads"], found["machine"]["kind"]) == (9, 3, 1, "cpu")
    (one,) = found["models"]
    assert (one["model"], one["setting"], one["goal"]) == ("zamba2", "fp32", 3.0)
    checks = one["checks"]
    assert checks["compared"] == 3 and checks["sure_tokens_are_the_same"]
    assert checks["largest_logit_difference"] < 1e-4  # of logits that differ by 0.3: roundings of 12 layers
    ours, theirs = one["results"]
    assert [(side["side"], side["rounds"]) for side in (ours, theirs)] == [("ours", 1), ("theirs", 1)]
    assert ours["median_seconds"].keys() == {"prefill", "token", "forward"} and theirs["median_seconds"].keys() == {"prefill", "token"}
    for side in (ours, theirs):
        assert all(0 < side["best_seconds"][name] <= seconds for name, seconds in side["median_seconds"].items())
        assert side["tokens_per_second"] == pytest.approx(1 / side["median_seconds"]["token"]) and side["peak_mb"] > 0
    mine, peers = (side["median_seconds"] for side in (ours, theirs))
    assert one["decode_over_theirs"] == pytest.approx(peers["token"] / mine["token"])
    assert one["prefill_over_theirs"] == pytest.approx(peers["prefill"] / mine["prefill"])
    assert one["prefill_over_forward"] == pytest.approx(mine["forward"] / mine["prefill"])
    assert "zamba2 fp32: " in made.stderr and " times; prefill " in made.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tokens", "1"), "at least 2 tokens"),
        (("--context", "0"), "after a context of 1"),
        (("--rounds", "0"), "in 1 round"),
        (("--threads", "0"), "at least 1 thread"),
        (("--out", "/nowhere/at/all.json"), "there is no folder /nowhere/at"),
        (("--models", "gpt2"), "invalid choice: 'gpt2'"),
        (("--settings", "fp16"), "invalid choice: 'fp16'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_it_cannot_do_is_said_before_it_starts(words, said):
    made = ran("--json", *words)
    assert made.returncode == 2 and said in made.stderr and made.stdout == ""
