"""The one training loop: every phase of every architecture, fresh, resumed or forked.

    begin -> [ read the global batch -> gradients -> clip -> update at the LR of the step's midpoint ] … -> states

What a step computes depends on the segment's semantic block and on absolute tokens; the request (micro-batch, threads,
logging, checkpoint interval) changes speed and, at most, the last bits.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # by torch.optim and meta tensors at their first use, 1.4 s: here a slot pays it before it forks

from zexp.store import retention
from zexp.store.attempt import Attempt
from zexp.store.errors import StoreError
from zexp.store.folder import OPTIMIZER, StageFolder, Store
from zexp.store.ids import short
from zexp.train import checkpoint, fingerprint, optimizer, schedule
from zexp.train.batches import Batches
from zexp.train.chain import batch_tokens, chain, is_step_boundary, start_tokens
from zexp.train.divergence import Watch
from zexp.train.logger import Curves, open_curves
from zexp.train.signals import StopFlag
from zexp.train.start import Training, begin, set_aside
from zexp.train.step import backward

log = logging.getLogger(__name__)


def run(store: Store, folder: StageFolder, request: Mapping[str, Any], attempt: Attempt) -> str:
    """Train a segment up to request["to"] (absolute tokens). "done", "diverged" or "interrupted".

    request: to, optimizer (whether the state there must be one to train on from), keep, micro_batch, threads, device, kernels, deterministic, log_every, checkpoint {every_seconds,
    rolling}, from_hf (the folder of a root's given weights), logger, retry_diverged, divergence {margin, steps}.
    """
    target = int(request["to"])
    if (found := folder.diverged()) is not None and found["tokens"] <= target:
        if not request.get("retry_diverged"):
            return "diverged"
        attempt.forget_divergence()
    segments = chain(store, folder.id)
    segment = segments[-1].semantic
    wanted = {target, *(tokens for tokens in request["keep"] if start_tokens(segment) < tokens <= target)}
    for tokens in sorted(wanted):
        if not is_step_boundary(segment, tokens):
            raise ValueError(f"no optimizer step of {folder} ends at {tokens} tokens, where a state is wanted")
    if problems := schedule.check(segment["lr"]):
        raise ValueError(f"the learning rate of {folder} is no schedule: {' '.join(problems)}")
    device = _device(request["device"])
    root = segments[0].semantic
    config = {"trajectory": folder.id, "segment": segment, "model": root["model"], "request": dict(request)}
    with _logging_to(attempt.log), _machine(request["threads"], request["deterministic"]), StopFlag() as stop:
        if _is_there(folder, target, attempt, request["optimizer"]):
            return "done"
        batches = Batches(store, segments, device)
        training = begin(
            store, segments, batches.stream, target, attempt, request["kernels"], device, request.get("from_hf")
        )
        details = fingerprint.fingerprint(root["model"], request, device)
        log.info("Training from %d to %d tokens on %s, threads: %d.", training.tokens, target, device, request["threads"])
        log.info("Fingerprint %s: %s", fingerprint.name_of(details), details)
        curves = open_curves(request.get("logger"), short(folder.id), config, attempt.path)
        try:
            return _Loop(segment, request, attempt, training, batches, wanted, details, curves).train(target, stop)
        finally:
            curves.close()


class _Loop:
    """What the steps of one attempt share."""

    def __init__(
        self,
        segment: Mapping[str, Any],
        request: Mapping[str, Any],
        attempt: Attempt,
        training: Training,
        batches: Batches,
        wanted: set[int],
        details: dict[str, Any],
        curves: Curves,
    ):
        self.segment, self.request, self.attempt = segment, request, attempt
        self.training, self.batches, self.wanted, self.curves = training, batches, wanted, curves
        self.fingerprint = fingerprint.name_of(details)
        training.fingerprints = {**training.fingerprints, self.fingerprint: details}
        vocab_size = training.model.semantic["vocab_size"]
        bound = request["divergence"]
        self.watch = Watch(vocab_size, bound["margin"], bound["steps"], training.above)
        self.saved_at = time.monotonic()
        self.pace = _Pace(training.tokens)

    def train(self, target: int, stop: StopFlag) -> str:
        training = self.training
        self._progress(target)
        while training.tokens < target:
            if stop.requested is not None:
                self._save(rolling=True)
                log.info("%s: stopped at %d tokens, to be resumed.", stop.requested, training.tokens)
                return "interrupted"
            self.attempt.check()
            if reason := self._step(target):
                return self._diverged(reason)
            if training.tokens in self.wanted:
                self._save(rolling=False)
            elif self._is_due():
                self._save(rolling=True)
        return "done"

    def _step(self, target: int) -> str | None:
        """One optimizer step; the reason if it diverged, and then nothing was updated."""
        training, segment = self.training, self.segment
        size = batch_tokens(segment, training.tokens)
        lr = schedule.lr(segment["lr"], training.tokens + size / 2)
        loss_on_device = backward(
            training.model,
            self.batches.read(training.tokens, size),
            micro_batch=self.request["micro_batch"],
            precision=segment["precision"],
            document_mask=segment["document_mask"],
        )
        norm_on_device = optimizer.clip(training.model, segment["optim"]["clip"])
        # The one wait for the device in a step: divergence has to be seen before the update.
        loss, grad_norm = torch.stack([loss_on_device, norm_on_device]).tolist()
        end, step = training.tokens + size, training.step + 1
        reason = self.watch.see(loss, grad_norm)
        rate = self.pace.at(end)
        if reason is not None or end >= target or step % self.request["log_every"] == 0:
            figures = {"step": step, "tokens": end, "loss": loss, "lr": lr}
            figures |= {"grad_norm": grad_norm, "tokens_per_second": rate}
            self.attempt.metric(**figures)
            self.curves.write(figures)
        if reason is not None:
            return reason
        optimizer.step(training.optimizer, lr)
        training.model.after_step()
        training.intervals = fingerprint.extended(training.intervals, training.tokens, end, self.fingerprint)
        training.tokens, training.step, training.above = end, step, self.watch.above
        self._progress(target, loss=loss, tokens_per_second=rate)
        return None

    def _diverged(self, reason: str) -> str:
        """Record that the step from here, whose end is what cannot be reached, diverged."""
        end = self.training.tokens + batch_tokens(self.segment, self.training.tokens)
        self.attempt.diverge(end, f"step {self.training.step + 1}: {reason}")
        log.info("Diverged at %d tokens: %s.", end, reason)
        return "diverged"

    def _progress(self, target: int, **figures: float) -> None:
        start, tokens = start_tokens(self.segment), self.training.tokens
        if rate := figures.get("tokens_per_second"):
            figures["eta_seconds"] = (target - tokens) / rate
        self.attempt.progress(tokens - start, target - start, "tokens", **figures)

    def _is_due(self) -> bool:
        every = self.request["checkpoint"]["every_seconds"]
        return every is not None and time.monotonic() - self.saved_at >= every

    def _save(self, rolling: bool) -> None:
        tokens = self.training.tokens
        folder = self.attempt.folder
        # A state at the segment's own start is its parent's.
        if tokens > start_tokens(self.segment) and folder.trainable(tokens) is None:
            scratch = self.attempt.scratch(f"state-{tokens}")
            facts = self.training.facts(self.batches.stream)
            checkpoint.write(scratch, self.training.model, self.training.optimizer, facts)
            self._publish(scratch, tokens, rolling)
            retention.prune(self.attempt, self.wanted, newest=self.request["checkpoint"]["rolling"])
        self.saved_at = time.monotonic()


    def _publish(self, scratch: Path, tokens: int, rolling: bool) -> None:
        """The state in its place. One that had lost its optimizer gets it back if it was made again to the bit."""
        target = f"states/{tokens}"
        log.info("Step %d: state at %d tokens%s.", self.training.step, tokens, ", to resume from" if rolling else "")
        if self.attempt.folder.state(tokens) is not None:
            if rolling:
                return
            if checkpoint.same(scratch, self.attempt.folder.path / target):
                self.attempt.attach(scratch, target, OPTIMIZER)
                return
            log.warning("The weights-only state at %d tokens has other bits than the one made now; it is set aside.", tokens)
            self.attempt.set_aside(target)
        self.attempt.publish(scratch, target, rolling=rolling)


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


def _device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device=cuda, but torch sees no GPU here. Use device=cpu or device=auto.")
    return wanted


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """What zexp's loggers say from INFO on goes to the end of the attempt's log."""
    package = logging.getLogger("zexp")
    level_before = package.level
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.setLevel(level_before)
        package.removeHandler(handler)
        handler.close()


@contextmanager
def _machine(threads: int, deterministic: bool) -> Iterator[None]:
    """The request's threads and determinism for this process; what was set before comes back."""
    threads_before = torch.get_num_threads()
    deterministic_before = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when CUDA starts
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic_before)
        torch.set_num_threads(threads_before)
