"""Small trainings for tests: configs compiled as users' are, run as a launcher runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import TinyCorpus
from zexp.blocks.resolve import numerics, resolve_model
from zexp.config.schema import Anneal, Mix, MixSource, Optim, Phase, Replay, Run, Schedule
from zexp.store.folder import StageFolder, Store
from zexp.train import loop
from zexp.train.phases import Chain, Segment, compile_chain

STEP = 128  # tokens of an optimizer step: 4 sequences of 32

NORM = {"kind": "rmsnorm", "eps": 1e-5}
ARCHS: dict[str, dict[str, Any]] = {
    "transformer": {
        "pattern": "a d",
        "width": 16,
        "tie_embeddings": True,
        "norm": NORM,
        "blocks": {"a": {"heads": 2}, "d": {"width": 24}},
    },
    "zamba2": {
        "pattern": "m gm",
        "width": 16,
        "tie_embeddings": True,
        "norm": NORM,
        "blocks": {
            "m": {"state_size": 8, "head_dim": 8, "chunk": 16},
            "g": {"heads": 2, "mlp_width": 24, "lora_rank": {"mlp": 2, "attention": 0}},
        },
    },
    "mamba2": {
        "pattern": "2*m",
        "width": 16,
        "tie_embeddings": True,
        "norm": NORM,
        "blocks": {"m": {"state_size": 8, "head_dim": 8, "chunk": 16}},
    },
    "blackmamba": {
        "pattern": "r e",
        "width": 16,
        "tie_embeddings": True,
        "norm": {**NORM, "final": "layernorm"},
        "blocks": {
            "r": {"state_size": 8},
            "e": {
                "experts": 4, "top_k": 1, "width": 12, "activation": "geglu_erf", "router": "sigmoid", "router_bias": True,
                "normalise": False, "aux_loss": 0.0, "sinkhorn_iterations": 8, "routing_group": "document",
            },
        },
    },
    "moe": {
        "pattern": "a e",
        "width": 16,
        "tie_embeddings": True,
        "norm": NORM,
        "blocks": {"a": {"heads": 2}, "e": {"width": 12, "experts": 4, "bias_rate": 0.01}},
    },
}

CONSTANT = Schedule(kind="constant", peak_lr=3e-3)


def wsd(decay_steps: int) -> Schedule:
    return Schedule(
        kind="wsd",
        peak_lr=3e-3,
        warmup_tokens=2 * STEP,
        decay=decay_steps * STEP,
        decay_shape="one_minus_sqrt",
        floor_fraction=0.0,
    )


def anneal(steps: int, *, fraction: float, optimizer_state: str = "carry", **changes: Any) -> Anneal:
    return Anneal(
        tokens=steps * STEP,
        mix=Mix(sources={"better": MixSource(weight=1.0)}),
        replay=Replay(fraction=fraction),
        optimizer_state=optimizer_state,
        **changes,
    )


def chain(
    corpus: TinyCorpus,
    steps: int,
    *,
    arch: str = "transformer",
    schedule: Schedule = CONSTANT,
    then: Anneal | None = None,
    optim: Optim | None = None,
    precision: str = "fp32",
    batch_tokens: int = STEP,
) -> Chain:
    """The segments of a run over `steps` steps and perhaps an anneal."""
    run = Run(
        seq_len=corpus.seq_len,
        precision=precision,
        mix=Mix(sources={"base": MixSource(weight=1.0)}),
        schedule=schedule,
        phases={"pretrain": Phase(tokens=steps * batch_tokens, batch_tokens=batch_tokens)},
        anneal=then,
        optim=optim or Optim(),
    )
    model = resolve_model(ARCHS[arch], corpus.vocab_size)
    return compile_chain(
        run,
        model=model,
        model_numerics=numerics(model),
        tokenizer=corpus.tokenizer,
        packing=lambda name, _source: corpus.packings[name],
    )


def request(to: int, **changes: Any) -> dict[str, Any]:
    return {
        "to": to,
        "optimizer": False,
        "keep": [],
        "micro_batch": 4,
        "threads": 1,
        "activation_checkpointing": "auto",
        "ranks": ranks(1),
        "device": "cpu",
        "kernels": "auto",
        "deterministic": True,
        "log_every": 10,
        "checkpoint": {"every_seconds": None, "rolling": 2},
        "logger": {"kind": "jsonl"},
        "divergence": {"margin": 2.0, "steps": 20},
        "retry_diverged": False,
        **changes,
    }


def ranks(count: int, seconds: float = 60.0) -> dict[str, Any]:
    """`ranks` of a request for so many processes on this machine."""
    return {"data": count, "nodes": 1, "timeout_seconds": seconds}


def create(store: Store, segment: Segment) -> StageFolder:
    folder = store.folder("trajectory", segment.id)
    folder.create(segment.semantic, {})
    return folder


def train(store: Store, segment: Segment, to: int | None = None, **changes: Any) -> str:
    """Train one segment whose parent is there; the outcome."""
    folder = create(store, segment)
    asked = request(segment.to if to is None else to, **changes)
    attempt = folder.attempt(asked)
    assert attempt is not None
    with attempt:
        return loop.run(store, folder, asked, attempt)


def train_all(store: Store, whole: Chain, **changes: Any) -> None:
    for segment in whole.segments:
        assert train(store, segment, **changes) == "done"


def tensors(store: Store, segment: Segment, tokens: int | None = None) -> dict[str, Tensor]:
    """Weights and optimizer of a state, by `weights/…` and `optimizer/…`."""
    state = store.folder("trajectory", segment.id).state(segment.to if tokens is None else tokens)
    assert state is not None
    found = {}
    for part in ("weights", "optimizer"):
        for file in sorted((state / part).glob("*.safetensors")):
            found |= {f"{part}/{name}": tensor for name, tensor in load_file(file).items()}
    return found


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if a[name].numpy().tobytes() != b[name].numpy().tobytes()]


def metrics(folder: StageFolder) -> list[dict[str, Any]]:
    return [line for record in folder.attempts() for line in record.metrics()]


def store_beside(store: Store, name: str) -> Store:
    """Another store with the same corpus."""
    root: Path = store.root.parent / name
    root.mkdir()
    for kind in ("tokenizer", "corpus", "packing"):
        (root / kind).symlink_to(store.root / kind)
    return Store(root)
