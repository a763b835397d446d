"""A hybrid that no preset has is one YAML: no Python is written, and it runs from text to scores."""

import json
from pathlib import Path

import pytest

from tests.test_cli import zexp

SMALL = ["corpus=mine", "mix=mine", "eval=bpb", "seq_len=64", "anneal=none", "phases.pretrain.tokens=8K",
         "phases.pretrain.batch_tokens=512", "schedule.warmup_tokens=512", "execution.log_every=1"]  # fmt: skip

# Bamba: attention among Mamba2 layers, an MLP after each. Nemotron-H with experts, in Megatron's letters.
ARCHS = {
    "bamba_shaped": """\
pattern: 2*(m d) a d m d
width: 32
blocks:
  m: {state_size: 8, head_dim: 8, groups: 2, chunk: 16}
  a: {heads: 4, kv_heads: 2, rope_fraction: 0.5}
  d: {width: 64}
""",
    "nemotron_shaped": """\
pattern: M-ME*-ME
width: 32
blocks:
  m: {state_size: 8, head_dim: 8, groups: 2, chunk: 16}
  a: {heads: 4, kv_heads: 2, rope_theta: null}
  d: {width: 64, activation: relu2}
  e: {width: 24, experts: 4, top_k: 2, router: sigmoid, aux_loss: 0.0, bias_rate: 0.001, shared_width: 24, activation: relu2}
""",
    "placed": """\
pattern: {layers: 5, fill: k, at: {(a|m): [1], gm: [3]}}
width: 32
norm: {kind: layernorm, embedding: true}
parallel: {combine: scaled_mean}
blocks:
  k: {head_dim: 8, lora_rank: {decay: 4, rate: 4, value: 4, gate: 4}}
  a: {heads: 4}
  m: {state_size: 8, head_dim: 8, chunk: 16}
  g: {heads: 4, mlp_width: 24}
""",
}


@pytest.mark.parametrize("name", ARCHS)
def test_a_yaml_is_enough(tmp_path: Path, name: str) -> None:
    assert zexp("init", "mine", cwd=tmp_path).returncode == 0
    folder = tmp_path / "mine"
    (folder / "conf/arch" / f"{name}.yaml").write_text(ARCHS[name])
    counted = json.loads(zexp("calc", "--json", f"arch={name}", "corpus=mine", cwd=folder).stdout)
    assert counted["parameters"]["total"] == sum(row["parameters"] for row in counted["blocks"]) > 0
    done = zexp("run", f"arch={name}", *SMALL, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = [
        json.loads(line)
        for path in sorted((folder / "store/trajectory").glob("*/attempts/*/metrics.jsonl"))
        for line in path.read_text().splitlines()
    ]
    losses = [one["loss"] for one in sorted(figures, key=lambda one: one["tokens"])]
    assert len(losses) >= 15 and sum(losses[-3:]) < sum(losses[:3])
