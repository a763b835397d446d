"""Logits and gradients of x d stacks and of `transformers`' xLSTM with the same random weights."""

from __future__ import annotations

import pytest
import torch

from tests.model.test_parity_transformers import VOCAB, WIDTH, State, Weights, assert_same, shared_names

transformers = pytest.importorskip("transformers", reason="parity needs the extra zexp[hf]")


# Their chunks take a row as far as they divide it, and steps the rest; one chunk size is larger than the row, so that steps
# take it all. Without the package `xlstm` their kernels are plain PyTorch, and gradients go through the stabiliser too:
# eps / denominator of them (1e-6) is what ours leave out.
@pytest.mark.parametrize("chunk", [4, 16, 64], ids="their chunks of {}".format)
def test_xlstm(chunk):
    config = transformers.xLSTMConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=3, num_heads=4, chunk_size=chunk, use_cache=False
    )  # their cache's heads have widths that are rounded up to whole 64s, their layers' have not
    theirs = transformers.xLSTMForCausalLM(config)

    def weights(state: State) -> Weights:
        yield from shared_names(state, "backbone.out_norm", "backbone.embeddings.weight", "lm_head.weight")
        for layer in range(3):
            old, x, d = f"backbone.blocks.{layer}", f"layers.{2 * layer}", f"layers.{2 * layer + 1}"
            cell = f"{old}.mlstm_layer"
            yield f"{x}.norm.weight", state[f"{old}.norm_mlstm.weight"]
            yield f"{d}.norm.weight", state[f"{old}.norm_ffn.weight"]
            yield f"{x}.branches.x.norm_weight", state[f"{cell}.multihead_norm.weight"].unflatten(0, (4, -1))
            yield f"{x}.branches.x.out_proj.weight", state[f"{cell}.out_proj.weight"]
            yield f"{d}.branches.d.down.weight", state[f"{old}.ffn.proj_down.weight"]
            into = [state[f"{cell}.{name}.weight"] for name in ("q", "k", "v", "ogate_preact")]
            yield f"{x}.branches.x.in_proj.weight", torch.cat(into)
            up = [state[f"{old}.ffn.{name}.weight"] for name in ("proj_up_gate", "proj_up")]
            yield f"{d}.branches.d.up.weight", torch.cat(up)
            for kind in ("weight", "bias"):
                gates = [state[f"{cell}.{name}_preact.{kind}"] for name in ("igate", "fgate")]
                yield f"{x}.branches.x.gates.{kind}", torch.cat(gates)

    arch = {
        "pattern": "3*(x d)",
        "width": WIDTH,
        "tie_embeddings": False,
        "norm": {"eps": 1e-6},
        "logit_softcap": 30.0,
        "blocks": {"x": {"heads": 4, "chunk": 8}, "d": {"width": 128}},  # 2.667 · 32, rounded up to whole 64s
    }
    assert_same(theirs, arch, weights)
