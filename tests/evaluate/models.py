"""Small models with drawn weights, and a state of one in a store."""

from __future__ import annotations

from typing import Any

from zexp.blocks.resolve import resolve_model
from zexp.data import tokenizer as tokenizers
from zexp.evaluate.model import Adapter
from zexp.model.build import build, decayed
from zexp.store.folder import Store
from zexp.store.ids import semantic_id
from zexp.train import optimizer

OPTIM = {"kind": "adamw", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}
MAMBA = {"expand": 2, "state_size": 16, "head_dim": 16, "groups": 1, "conv_width": 4, "chunk": 64}
ARCHES: dict[str, dict[str, Any]] = {
    "transformer": {"pattern": "2*(a d)", "blocks": {"a": {"heads": 4}, "d": {"width": 85, "activation": "swiglu"}}},
    "moe": {"pattern": "2*(a e)", "blocks": {"a": {"heads": 4}, "e": {"width": 40, "experts": 8}}},
    "mamba2": {"pattern": "2*m", "blocks": {"m": MAMBA}},
    "zamba2": {
        "pattern": "m gm",
        "blocks": {
            "m": MAMBA,
            "g": {"copies": 1, "heads": 4, "mlp_width": 48, "lora_rank": {"mlp": 4, "attention": 0}},
        },
    },
}


def semantic_of(arch: str, vocab_size: int) -> dict[str, Any]:
    return resolve_model({"width": 64, "tie_embeddings": True, **ARCHES[arch]}, vocab_size)


def adapter_of(store: Store, tokenizer_id: str, arch: str, *, batch_size: int = 4, context_tokens: int = 96) -> Adapter:
    tokenizers.one_thread()
    tokenizer = tokenizers.load(store, tokenizer_id)
    model = build(semantic_of(arch, tokenizer.get_vocab_size()), seed=1)
    for parameter in model.parameters():
        parameter.data.mul_(3.0)  # as drawn, a model is close to uniform: mistakes would hardly show
    return Adapter(model, tokenizer, context_tokens=context_tokens, batch_size=batch_size)


def state_of(store: Store, tokenizer_id: str, arch: str = "mamba2") -> dict[str, Any]:
    """{id, tokens} of a state with drawn weights, published as training does."""
    from zexp.train import checkpoint

    vocab_size = tokenizers.load(store, tokenizer_id).get_vocab_size()
    model = semantic_of(arch, vocab_size)
    semantic = {"parent": None, "model": model, "tokenizer": tokenizer_id, "seeds": {"init": 1}}
    folder = store.folder("trajectory", semantic_id(semantic))
    folder.create(semantic, {})
    attempt = folder.attempt({})
    assert attempt is not None
    with attempt:
        scratch = attempt.scratch("state")
        net = build(model, seed=1)
        checkpoint.write(scratch, net, optimizer.build(net, OPTIM, decayed(net)), {"tokens": 64})
        attempt.publish(scratch, "states/64")
    return {"id": folder.id, "tokens": 64}
