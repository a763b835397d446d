"""What a training leaves behind: metrics, curves, progress and states. Rank 0 keeps it, the others nothing."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from zexp.data.stream import Stream
from zexp.store import retention
from zexp.store.attempt import Attempt
from zexp.store.folder import OPTIMIZER
from zexp.train import checkpoint
from zexp.train.chain import start_tokens
from zexp.train.logger import Curves
from zexp.train.start import Training

log = logging.getLogger(__name__)


class Record(Protocol):
    """What the loop says while it trains."""

    def check(self) -> None:
        """Before each step. Raises LeaseLost."""

    def figures(self, figures: Mapping[str, Any]) -> None:
        """A step's numbers: step, tokens, loss, …"""

    def progress(self, tokens: int, target: int, **figures: float) -> None:
        """How far it is."""

    def diverge(self, tokens: int, reason: str) -> None:
        """It ends here: what would end at `tokens` cannot be reached."""

    def is_due(self) -> bool:
        """True if it is time for a state to resume from."""

    def save(self, training: Training, rolling: bool) -> None:
        """The state as it is. rolling: only to resume from."""


class NoRecord:
    """Every rank but 0."""

    def check(self) -> None: ...

    def figures(self, figures: Mapping[str, Any]) -> None: ...

    def progress(self, tokens: int, target: int, **figures: float) -> None: ...

    def diverge(self, tokens: int, reason: str) -> None: ...

    def is_due(self) -> bool:
        return False

    def save(self, training: Training, rolling: bool) -> None: ...


class KeptRecord:
    """In attempts/<n> and, of states, in states/."""

    def __init__(
        self,
        attempt: Attempt,
        segment: Mapping[str, Any],
        stream: Stream,
        wanted: set[int],
        options: Mapping[str, Any],
        curves: Curves,
    ) -> None:
        """options: {every_seconds, rolling}, when states to resume from are written and how many stay."""
        self._attempt, self._stream, self._wanted, self._options = attempt, stream, wanted, options
        self._start, self._curves = start_tokens(segment), curves
        self._saved_at = time.monotonic()

    def check(self) -> None:
        self._attempt.check()

    def figures(self, figures: Mapping[str, Any]) -> None:
        self._attempt.metric(**figures)
        self._curves.write(figures)

    def progress(self, tokens: int, target: int, **figures: float) -> None:
        if rate := figures.get("tokens_per_second"):
            figures["eta_seconds"] = (target - tokens) / rate
        self._attempt.progress(tokens - self._start, target - self._start, "tokens", **figures)

    def diverge(self, tokens: int, reason: str) -> None:
        self._attempt.diverge(tokens, reason)

    def is_due(self) -> bool:
        every = self._options["every_seconds"]
        return every is not None and time.monotonic() - self._saved_at >= every

    def save(self, training: Training, rolling: bool) -> None:
        tokens = training.tokens
        # A state at the segment's own start is its parent's.
        if tokens > self._start and self._attempt.folder.trainable(tokens) is None:
            scratch = self._attempt.scratch(f"state-{tokens}")
            checkpoint.write(scratch, training.model, training.optimizer, training.facts(self._stream))
            log.info("Step %d: state at %d tokens%s.", training.step, tokens, ", to resume from" if rolling else "")
            self._publish(scratch, tokens, rolling)
            retention.prune(self._attempt, self._wanted, newest=self._options["rolling"])
        self._saved_at = time.monotonic()

    def _publish(self, scratch: Path, tokens: int, rolling: bool) -> None:
        """The state in its place. One that had lost its optimizer gets it back if it was made again to the bit."""
        target = f"states/{tokens}"
        if self._attempt.folder.state(tokens) is not None:
            if rolling:
                return
            if checkpoint.same(scratch, self._attempt.folder.path / target):
                self._attempt.attach(scratch, target, OPTIMIZER)
                return
            log.warning("The weights-only state at %d tokens has other bits than the one made now; it is set aside.", tokens)
            self._attempt.set_aside(target)
        self._attempt.publish(scratch, target, rolling=rolling)
