"""The one training loop: every phase of every architecture, fresh, resumed or forked, by one process or several.

    begin -> [ read the global batch -> gradients -> clip -> update at the LR of the step's midpoint ] … -> states

What a step computes depends on the segment's semantic block and on absolute tokens; the request (micro-batch, threads,
ranks, logging, checkpoint interval) changes speed and, at most, the last bits.

Of several ranks (zexp/train/parallel.py), rank 0 comes from `run` and the others from `accompany`; they go through the
same steps, and rank 0 alone reads and writes states. It sends what it begins with to the others.
"""

import logging
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo  # by torch.optim and meta tensors at their first use, 1.4 s: here a slot pays it before it forks
from torch import Tensor

from zexp.store.attempt import Attempt
from zexp.store.errors import StoreError
from zexp.store.folder import StageFolder, Store
from zexp.store.ids import short
from zexp.train import checkpoint, fingerprint, optimizer, ranks, schedule
from zexp.train.batches import Batches
from zexp.train.chain import batch_tokens, chain, is_step_boundary, start_tokens
from zexp.train.divergence import Watch
from zexp.train.lifeline import Lead, Line
from zexp.train.logger import logging_to, open_curves
from zexp.train.machine import recomputes, settled
from zexp.train.parallel import World
from zexp.train.record import KeptRecord, NoRecord, Record
from zexp.train.signals import StopFlag
from zexp.train.start import Training, begin, blank, set_aside
from zexp.train.step import backward

log = logging.getLogger(__name__)


def run(store: Store, folder: StageFolder, request: Mapping[str, Any], attempt: Attempt) -> str:
    """Train a segment up to request["to"] (absolute tokens). "done", "diverged" or "interrupted".

    request: to, optimizer (whether the state there must be one to train on from), keep, micro_batch, threads,
    activation_checkpointing, device, kernels, deterministic, log_every, checkpoint {every_seconds, rolling},
    ranks {data, nodes, timeout_seconds}, from_hf (the folder of a root's given weights), logger, retry_diverged,
    divergence {margin, steps}.
    """
    target = int(request["to"])
    if (found := folder.diverged()) is not None and found["tokens"] <= target:
        if not request.get("retry_diverged"):
            return "diverged"
        attempt.forget_divergence()
    segments = chain(store, folder.id)
    segment = segments[-1].semantic
    for tokens in sorted(wanted := _wanted(segment, request)):
        if not is_step_boundary(segment, tokens):
            raise ValueError(f"no optimizer step of {folder} ends at {tokens} tokens, where a state is wanted")
    if problems := schedule.check(segment["lr"]):
        raise ValueError(f"the learning rate of {folder} is no schedule: {' '.join(problems)}")
    with logging_to(attempt.log), settled(request["threads"], request["deterministic"]), StopFlag() as stop:
        if _is_there(folder, target, attempt, request["optimizer"]):
            return "done"
        with ranks.gathered(store, request, attempt) as lead:
            world = World() if lead is None else lead.world
            device = world.device(request["device"])
            batches = Batches(store, segments, device, world.rank, world.size)
            training = begin(
                store, segments, batches.stream, target, attempt, request["kernels"], device, request.get("from_hf")
            )
            training.model.recomputes = recomputes(training.model.semantic, segment, request, device)
            details = fingerprint.fingerprint(segments[0].semantic["model"], request, device)
            start, threads = training.tokens, request["threads"]
            log.info("Training from %d to %d tokens on %s, threads: %d.", start, target, device, threads)
            log.info("Fingerprint %s: %s", fingerprint.name_of(details), details)
            config = {"trajectory": folder.id, "segment": segment, "model": segments[0].semantic["model"]}
            config |= {"request": dict(request)}
            with _together(lead, attempt, training, details, device, stop) as complete:
                if not complete:
                    return "interrupted"
                curves = open_curves(request.get("logger"), short(folder.id), config, attempt.path)
                record = KeptRecord(attempt, segment, batches.stream, wanted, request["checkpoint"], curves)
                try:
                    return _Loop(segment, request, world, training, batches, record, details).train(target, stop)
                finally:
                    curves.close()


def accompany(
    store: Store, request: Mapping[str, Any], world: World, line: Line, word: Mapping[str, Any], stop: StopFlag
) -> str:
    """Take part in the training that rank 0 runs, as another rank. word: what rank 0 said (see _together)."""
    segments = chain(store, word["trajectory"])
    root, segment = segments[0].semantic, segments[-1].semantic
    with settled(request["threads"], request["deterministic"]):
        device = world.device(request["device"])
        details = fingerprint.fingerprint(root["model"], request, device)
        _check_alike(details, word["fingerprint"])
        batches = Batches(store, segments, device, world.rank, world.size)
        training = blank(root, segment, request["kernels"], device)
        training.model.recomputes = recomputes(root["model"], segment, request, device)
        training.tokens, training.step, training.above = word["tokens"], word["step"], word["above"]
        line.ready()
        with world.connected(line.group, device, request["ranks"]["timeout_seconds"]):
            world.broadcast(_tensors(training))
            log.info("Rank %d of %d, from %d tokens on %s.", world.rank, world.size, training.tokens, device)
            loop = _Loop(segment, request, world, training, batches, NoRecord(), details)
            return loop.train(int(request["to"]), stop)


class _Loop:
    """What the steps of one attempt share."""

    def __init__(
        self,
        segment: Mapping[str, Any],
        request: Mapping[str, Any],
        world: World,
        training: Training,
        batches: Batches,
        record: Record,
        details: dict[str, Any],
    ):
        self.segment, self.request, self.world = segment, request, world
        self.training, self.batches, self.record = training, batches, record
        self.wanted = _wanted(segment, request)
        self.fingerprint = fingerprint.name_of(details)
        training.fingerprints = {**training.fingerprints, self.fingerprint: details}
        vocab_size = training.model.semantic["vocab_size"]
        bound = request["divergence"]
        self.watch = Watch(vocab_size, bound["margin"], bound["steps"], training.above)
        self.pace = _Pace(training.tokens)
        self.told: str | None = None  # who was told to stop, as all ranks heard it in the last collective

    def train(self, target: int, stop: StopFlag) -> str:
        training = self.training
        self.record.progress(training.tokens, target)
        self._hear(self.world.agree(self._flags(stop)).tolist())
        while training.tokens < target:
            if told := self.told or (stop.requested if self.world.size == 1 else None):
                self.record.save(training, rolling=True)
                log.info("%s: stopped at %d tokens, to be resumed.", told, training.tokens)
                return "interrupted"
            self.record.check()
            if reason := self._step(target, stop):
                return self._diverged(reason)
            if training.tokens in self.wanted:
                self.world.check_same(checkpoint.weight_tensors(training.model))
                self.record.save(training, rolling=False)
            elif self.record.is_due():
                self.record.save(training, rolling=True)
        return "done"

    def _step(self, target: int, stop: StopFlag) -> str | None:
        """One optimizer step; the reason if it diverged, and then nothing was updated."""
        training, segment, model = self.training, self.segment, self.training.model
        size = batch_tokens(segment, training.tokens)
        lr = schedule.lr(segment["lr"], training.tokens + size / 2)
        own_loss = backward(
            model,
            self.batches.read(training.tokens, size),
            micro_batch=self.request["micro_batch"],
            precision=segment["precision"],
            document_mask=segment["document_mask"],
            labels=size,
        )
        summed = self.world.sum_gradients(model, torch.cat([own_loss.view(1), self._flags(stop)]))
        norm_on_device = optimizer.clip(model, segment["optim"]["clip"])
        if (end := training.tokens + size) < target:
            self.batches.prepare(end, batch_tokens(segment, end))
        # The one wait for the device in a step: divergence has to be seen before the update.
        loss, *flags, grad_norm = torch.cat([summed, norm_on_device.view(1)]).tolist()
        self._hear(flags)
        step = training.step + 1
        reason = self.watch.see(loss, grad_norm)
        rate = self.pace.at(end)
        if reason is not None or end >= target or step % self.request["log_every"] == 0:
            figures = {"step": step, "tokens": end, "loss": loss, "lr": lr}
            self.record.figures(figures | {"grad_norm": grad_norm, "tokens_per_second": rate})
        if reason is not None:
            return reason
        optimizer.step(training.optimizer, lr)
        self.world.sum_counts(model.step_counts())
        model.after_step()
        training.intervals = fingerprint.extended(training.intervals, training.tokens, end, self.fingerprint)
        training.tokens, training.step, training.above = end, step, self.watch.above
        self.record.progress(end, target, loss=loss, tokens_per_second=rate)
        return None

    def _flags(self, stop: StopFlag) -> Tensor:
        """The number of the signal that this rank was sent, in its place; none where this process is the only one."""
        flags = [0.0] * (self.world.size if self.world.size > 1 else 0)
        if flags and stop.requested is not None:
            flags[self.world.rank] = float(signal.Signals[stop.requested])
        return torch.tensor(flags, dtype=torch.float32, device=self.training.model.embedding.weight.device)

    def _hear(self, flags: list[float]) -> None:
        for rank, number in enumerate(flags):
            if number:
                self.told = self.told or f"{signal.Signals(int(number)).name} to rank {rank}"

    def _diverged(self, reason: str) -> str:
        """Record that the step from here, whose end is what cannot be reached, diverged."""
        end = self.training.tokens + batch_tokens(self.segment, self.training.tokens)
        self.record.diverge(end, f"step {self.training.step + 1}: {reason}")
        log.info("Diverged at %d tokens: %s.", end, reason)
        return "diverged"


class _Pace:
    """Tokens per second, averaged over about the last ten seconds; execution only, never part of a state."""

    def __init__(self, tokens: int):
        self._marks = [(time.monotonic(), tokens)]

    def at(self, tokens: int) -> float:
        now = time.monotonic()
        self._marks = [mark for mark in self._marks if now - mark[0] <= 10.0] or self._marks[-1:]
        since, before = self._marks[0]
        self._marks.append((now, tokens))
        return (tokens - before) / max(now - since, 1e-9)


@contextmanager
def _together(
    lead: Lead | None, attempt: Attempt, training: Training, details: dict[str, Any], device: str, stop: StopFlag
) -> Iterator[bool]:
    """All ranks with what rank 0 has begun with; False if this process is told to stop before they have come."""
    if lead is None:
        yield True
        return
    word: dict[str, Any] = {"trajectory": attempt.folder.id, "fingerprint": details}
    word |= {"tokens": training.tokens, "step": training.step, "above": training.above}
    with lead.training(attempt, word, device, stop) as complete:
        if complete:
            lead.world.broadcast(_tensors(training))
            log.info("%d ranks train together.", lead.world.size)
        yield complete


def _tensors(training: Training) -> list[Tensor]:
    """What a state holds."""
    optimizer_state = optimizer.state_tensors(training.model, training.optimizer)
    return [*checkpoint.weight_tensors(training.model).values(), *optimizer_state.values()]


def _check_alike(ours: Mapping[str, Any], rank_0s: Mapping[str, Any]) -> None:
    """Ranks that compute with other bits would drift apart."""
    if differing := [key for key in ours if ours[key] != rank_0s.get(key)]:
        text = "; ".join(f"{key} is {ours[key]} here and {rank_0s.get(key)} at rank 0" for key in differing)
        raise RuntimeError(f"The ranks of one training must be of one kind: {text}. Choose nodes that are alike.")


def _wanted(segment: Mapping[str, Any], request: Mapping[str, Any]) -> set[int]:
    """The token counts where a state is to stay."""
    target = int(request["to"])
    return {target, *(tokens for tokens in request["keep"] if start_tokens(segment) < tokens <= target)}


def _is_there(folder: StageFolder, target: int, attempt: Attempt, with_optimizer: bool) -> bool:
    """True if the state at `target` is in place and whole; a damaged one is set aside."""
    state = folder.trainable(target) if with_optimizer else folder.state(target)
    if state is None:
        return False
    try:
        folder.verify(state)
    except StoreError as error:
        set_aside(attempt, target, error)
        return False
    return True
