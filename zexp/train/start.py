"""Where a segment's training begins: at its own newest good state, at its parent's, or at initial weights."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zexp.config.errors import ConfigError
from zexp.data.stream import Segment, Stream
from zexp.model.build import build, decayed
from zexp.model.hf import convert as hf_convert
from zexp.model.hf import folder as hf_folder
from zexp.model.language_model import LanguageModel
from zexp.store.attempt import Attempt
from zexp.store.errors import StoreError
from zexp.store.fingerprint import DigestCache
from zexp.store.folder import Store
from zexp.train import checkpoint, optimizer
from zexp.train.chain import start_tokens

log = logging.getLogger(__name__)


@dataclass
class Training:
    """A state in memory.

    step: optimizer steps since the root's initial weights. intervals and fingerprints: under which numerics fingerprint
    which tokens were trained. above: consecutive steps above the bound of divergence.py.
    """

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    tokens: int
    step: int
    intervals: list[dict[str, Any]]
    fingerprints: dict[str, dict[str, Any]]
    above: int = 0

    def facts(self, stream: Stream) -> dict[str, Any]:
        """The contents of state.json."""
        return {
            "tokens": self.tokens,
            "step": self.step,
            "cursors": stream.consumed(self.tokens),
            "fingerprints": self.intervals,
            "fingerprint_details": self.fingerprints,
            "steps_above_bound": self.above,
        }


def begin(
    store: Store,
    chain: Sequence[Segment],
    stream: Stream,
    target: int,
    attempt: Attempt,
    kernels: str,
    device: str,
    from_hf: str | None = None,
) -> Training:
    """The training at the newest token count up to `target` that can be had.

    from_hf: where the root's weights lie, if its semantic block says that they are given.

    A state of this trajectory that fails its checksums is set aside, said in the log, and the one before it is tried.
    Raises StoreError if the parent's state is missing or damaged (set aside then): its own stage has to make it again.
    """
    root, last = chain[0].semantic, chain[-1].semantic
    if (state := _newest_good(attempt, target)) is not None:
        training = blank(root, last, kernels, device)
        _load(training, state, stream, with_optimizer=True)
        log.info("Resuming at %d tokens.", training.tokens)
    elif last["parent"] is not None:
        fork = start_tokens(last)
        parent = store.folder("trajectory", last["parent"]["id"])
        state = checkpoint.verified(parent, fork)
        training = blank(root, last, kernels, device)
        carry = last["optimizer_state"] == "carry"
        _load(training, state, Stream(chain[:-1]), with_optimizer=carry)
        training.above = 0
        log.info("Forking at %d tokens; the optimizer's state is %s.", fork, "carried" if carry else "reset")
    elif "init" in root:
        training = blank(root, last, kernels, device)
        assert from_hf is not None, "the plan says where the weights lie"
        _load_given(store, root, Path(from_hf), training.model)
        log.info("Starting with the weights of %s.", from_hf)
    else:
        training = blank(root, last, kernels, device, root["seeds"]["init"])
    return training


def blank(
    root: Mapping[str, Any], segment: Mapping[str, Any], kernels: str, device: str, seed: int | None = None
) -> Training:
    """A model and its optimizer at 0 tokens.

    seed: None = the weights hold nothing yet, something is loaded over them (to draw billions of them takes seconds).
    """
    model = build(root["model"], seed=seed, kernels=kernels, device=device)
    return Training(model, optimizer.build(model, segment["optim"], decayed(model)), 0, 0, [], {})


def _load_given(store: Store, root: Mapping[str, Any], path: Path, model: LanguageModel) -> None:
    """The weights of a folder that were planned with. Raises StoreError if it holds others by now, or is gone."""
    try:
        folder = hf_folder.read(path, "init.from_hf")
        family = hf_folder.check(folder, root["model"], "init.from_hf")
    except ConfigError as error:
        raise StoreError(f"The initial weights were there when this was planned: {error}") from error
    found = hf_folder.init_semantic(folder, family, DigestCache(store.cache / "files.json"))
    if found["from_hf"] != root["init"]["from_hf"]:
        raise StoreError(f"The weights in {path} have changed since this was planned. Run the same command again.")
    hf_convert.load(folder, family, model, root["model"])


def _newest_good(attempt: Attempt, target: int) -> Path | None:
    """The trajectory's newest state up to `target` that can be trained on; damaged ones are set aside."""
    folder = attempt.folder
    for tokens in reversed([tokens for tokens in folder.states() if tokens <= target]):
        state = folder.state(tokens)
        assert state is not None
        if folder.trainable(tokens) is None:
            log.info("The state at %d tokens has weights only: resuming before it.", tokens)
            continue
        try:
            folder.verify(state)
        except StoreError as error:
            set_aside(attempt, tokens, error)
        else:
            return state
    return None


def set_aside(attempt: Attempt, tokens: int, error: StoreError) -> None:
    """Move a damaged state into the attempt's folder and say so."""
    attempt.set_aside(f"states/{tokens}")
    log.warning("The state at %d tokens is damaged; it is set aside in %s.\n%s", tokens, attempt.path, error)


def _load(training: Training, state: Path, stream: Stream, with_optimizer: bool) -> None:
    facts = checkpoint.read_facts(state)
    if facts["cursors"] != stream.consumed(facts["tokens"]):
        raise StoreError(
            f"{state} was trained on other data than its config says: its cursors are {facts['cursors']}, "
            f"not {stream.consumed(facts['tokens'])}. The code of the data order changed without its `numerics`."
        )
    checkpoint.load_weights(state, training.model)
    if with_optimizer:
        checkpoint.load_optimizer(state, training.model, training.optimizer)
    training.tokens, training.step = facts["tokens"], facts["step"]
    training.intervals, training.fingerprints = facts["fingerprints"], facts["fingerprint_details"]
    training.above = facts["steps_above_bound"]
