"""How rank 0 and the other ranks of a training know of each other outside collectives: who is there, who died, and why.

Rank 0 leads: it alone holds the lease, reads and writes states and says how the stage ended. Every other rank keeps a
TCP connection to it, from its start to its end; the kernel closes it when a process dies and gives it up when a
machine is gone (keep-alive, 25 s). Lines of JSON:

    rank r → rank 0   {op: hello, rank, host, pid, token}   {op: ready}   {op: failed, error, traceback, apart}
    rank 0 → rank r   {op: train, …} once there is something to train     {op: over, result}, the last word

A rank that dies without a word, or says failed, ends the stage: rank 0 writes failure.json (the launcher may kill it any
moment), says over, so that ranks which wait in a collective end, and raises RankFailed where it trains.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist

from zexp.store.attempt import Attempt, AttemptRecord
from zexp.train.parallel import RanksApart, World
from zexp.train.signals import StopFlag

log = logging.getLogger(__name__)

SETTLE_SECONDS = 1.0  # a dead rank breaks the others' collectives: how long to wait for who it was
EXPLAIN_SECONDS = 10.0  # after a broken collective: for somebody to say why
STUCK_SECONDS = 20.0  # rank 0 has failed, and its main thread still has not come back from a collective
LAST_WORD_SECONDS = 20.0  # a rank that failed waits for `over`: its exit may make a launcher kill rank 0
LOG_LINES = 15
_KEY, _GROUP = "zexp/lifeline", "zexp/group"


class RankFailed(RuntimeError):
    """Another rank of this training failed or died; the text says which and why."""


@dataclass
class _Peer:
    rank: int
    host: str
    pid: int
    connection: socket.socket
    unread: bytes = b""
    ready: bool = False
    failed: dict[str, Any] | None = None
    gone: bool = False


class Lead:
    """Rank 0's side. A context manager: leaving it says over, if nobody did."""

    def __init__(self, world: World, seconds: float) -> None:
        """seconds: how long ranks may take to come, and to answer in a collective."""
        self.store = world.store(seconds)
        self.world = World(0, world.size, world.local_rank, world.address, self.store.port, world.hosted)
        self.seconds = seconds
        self.processes: dict[int, subprocess.Popen[bytes]] = {}  # ranks that were started by this process
        self._peers: dict[int, _Peer] = {}
        self._changed = threading.Condition()
        self._began = time.monotonic()
        self._attempt: Attempt | None = None  # while it trains
        self._used = False
        self._over: str | None = None
        self._troubled_at: float | None = None
        self._trouble: str | None = None  # settled: the reason, in words
        self._token = secrets.token_hex(16)
        self._listener = _listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        port = self._listener.getsockname()[1]
        self.store.set(_KEY, json.dumps({"port": port, "token": self._token}))
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="lifeline", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over("failed")
        self._wait_for_late_ones()
        self._closing = True
        self._thread.join()
        for peer in self._peers.values():
            peer.connection.close()
        self._listener.close()
        self._selector.close()

    @contextmanager
    def training(self, attempt: Attempt, word: Mapping[str, Any], device: str, stop: StopFlag) -> Iterator[bool]:
        """All ranks, connected. False, at once, if this process was told to stop before they had come.

        word: what the others are told. Raises RankFailed, here or out of the block, for a rank that failed or died.
        """
        with self._changed:
            if self._used:
                raise RuntimeError(
                    "The other ranks of this job trained for the attempt whose lease was lost. "
                    "Run the same command again."
                )
            self._used, self._attempt = True, attempt
        try:
            if not self._gathered("hello", lambda peer: True, stop):
                yield False
                return
            self._tell(op="train", attempt=str(attempt.path.relative_to(attempt.folder.store.root)), **word)
            if not self._gathered("ready", lambda peer: peer.ready, stop):
                yield False
                return
            with self.world.connected(dist.PrefixStore(_GROUP, self.store), device, self.seconds):
                yield True
        except RanksApart as error:
            raise self._why(error) from error
        finally:
            with self._changed:
                self._attempt = None

    def over(self, result: str) -> None:
        """The stage has ended so: the last word to the ranks. The first one that is said counts."""
        with self._changed:
            if self._over is None:
                self._over = result
                self._tell(op="over", result=result)

    def _wait_for_late_ones(self) -> None:
        """Where nothing had to be trained, ranks may come when it is over: they have to hear that."""
        until = time.monotonic() + self.seconds
        with self._changed:
            while len(self._peers) + 1 < self.world.size and not self.processes and time.monotonic() < until:
                self._changed.wait(0.2)

    # Waiting, in the thread that trains

    def _gathered(self, what: str, there: Callable[[_Peer], bool], stop: StopFlag) -> bool:
        """Wait for a word of every rank. False if this process is told to stop meanwhile. Raises RankFailed."""
        until = time.monotonic() + self.seconds
        with self._changed:
            while True:
                if self._trouble is not None:
                    raise RankFailed(self._trouble)
                missing = [r for r in range(1, self.world.size) if r not in self._peers or not there(self._peers[r])]
                if not missing and self._troubled_at is None:
                    return True
                if stop.requested is not None:
                    return False
                if missing and time.monotonic() >= until:
                    ranks = ", ".join(map(str, missing))
                    raise RankFailed(
                        f"{len(missing)} of {self.world.size} ranks ({ranks}) did not say {what} within "
                        f"{self.seconds:g} s (parallelism.timeout_seconds). Their logs are beside this one, log.rank1 and "
                        "so on, or the launcher's."
                    )
                self._changed.wait(0.2)

    def _why(self, error: RanksApart) -> RankFailed:
        until = time.monotonic() + EXPLAIN_SECONDS
        with self._changed:
            while self._trouble is None and time.monotonic() < until:
                self._changed.wait(0.2)
            if self._trouble is not None:
                return RankFailed(self._trouble)
        return RankFailed(
            f"A collective failed, and no rank says why: one may hang, be slower than parallelism.timeout_seconds = "
            f"{self.seconds:g}, or be cut off.\n{error}"
        )

    # The thread that listens

    def _serve(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select(0.2):
                key.data()
            with self._changed:
                self._look()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        _keep_alive(connection)
        connection.settimeout(5.0)
        try:
            hello = json.loads(_line(connection))
        except (OSError, ValueError):
            connection.close()
            return
        if not isinstance(hello, dict) or not secrets.compare_digest(str(hello.get("token")), self._token):
            connection.close()  # some stranger that tries ports
            return
        peer = _Peer(hello["rank"], hello["host"], hello["pid"], connection)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._hear(peer))
        with self._changed:
            self._peers[peer.rank] = peer
            if self._over is not None:
                _send(connection, op="over", result=self._over)
            self._changed.notify_all()

    def _hear(self, peer: _Peer) -> None:
        try:
            got = peer.connection.recv(1 << 16)
        except OSError:  # reset, or kept alive in vain
            got = b""
        with self._changed:
            if not got:
                self._selector.unregister(peer.connection)
                peer.gone = True
            *lines, peer.unread = (peer.unread + got).split(b"\n")
            for message in map(json.loads, lines):
                if message["op"] == "ready":
                    peer.ready = True
                elif message["op"] == "failed":
                    peer.failed = message
            self._changed.notify_all()

    def _look(self) -> None:
        """Notice who is lost; once it is clear who was first, write it down and let nobody wait any longer."""
        if self._over is None and self._troubled_at is None and (self._lost() or self._stillborn()):
            self._troubled_at = time.monotonic()
        if self._troubled_at is None:
            return
        waited = time.monotonic() - self._troubled_at
        if self._trouble is None and (self._over is not None or waited >= SETTLE_SECONDS or self._is_clear()):
            self._trouble = self._told()
            if self._attempt is not None:
                AttemptRecord(self._attempt.path, self._attempt.n).record_failure(*_split(self._trouble))
            self.over("failed")
            self._changed.notify_all()
        if self._attempt is not None and waited >= STUCK_SECONDS:
            log.error("Rank 0 does not come back from a collective: its process ends. %s", self._trouble)
            os._exit(1)

    def _lost(self) -> list[_Peer]:
        return [peer for peer in self._peers.values() if peer.gone or peer.failed is not None]

    def _stillborn(self) -> list[int]:
        """Ranks of our own that ended before they said a word."""
        return [r for r, process in self.processes.items() if r not in self._peers and process.poll() is not None]

    def _is_clear(self) -> bool:
        return any(peer.failed is not None and not peer.failed["apart"] for peer in self._lost())

    def _told(self) -> str:
        """Which rank failed and why; of several the one that did not fail because of another."""
        lost = self._lost()
        own = [peer for peer in lost if peer.failed is not None and not peer.failed["apart"]]
        if own:
            peer = own[0]
            assert peer.failed is not None
            return f"{self._name(peer)} failed: {peer.failed['error']}\n{peer.failed['traceback']}".rstrip()
        silent = [peer for peer in lost if peer.failed is None]
        if silent:
            return f"{self._name(silent[0])} ended without a word: {self._ending(silent[0].rank)}"
        if lost:
            assert lost[0].failed is not None
            return f"{self._name(lost[0])} could not reach another rank: {lost[0].failed['error']}"
        rank = self._stillborn()[0]
        return f"Rank {rank} ended before it had begun: {self._ending(rank)}"

    def _name(self, peer: _Peer) -> str:
        return f"Rank {peer.rank} (process {peer.pid} on {peer.host})"

    def _ending(self, rank: int) -> str:
        """How its process ended, as far as this one knows, and the end of its log."""
        how = "it was killed, or its memory ran out."
        process = self.processes.get(rank)
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(2.0)
                how = f"exit status {status}."
                if status < 0:
                    hint = ", by hand or because memory ran out" if -status == signal.SIGKILL else ""
                    how = f"ended by {signal.Signals(-status).name}{hint}."
        if self._attempt is None:
            return how
        path = log_of(self._attempt.path, rank)
        text = path.read_text(errors="replace").rstrip() if path.exists() else ""
        ended = "\n".join(text.splitlines()[-LOG_LINES:])
        return f"{how}\n{path.name} ends with:\n{ended}" if ended else how

    def _tell(self, **message: Any) -> None:
        for peer in self._peers.values():
            with suppress(OSError):  # it has gone: reading says so
                _send(peer.connection, **message)


_leading: Lead | None = None


@contextmanager
def lead(world: World, seconds: float) -> Iterator[Lead]:
    """Lead the other ranks of this job until the block ends; `leading()` finds it meanwhile."""
    global _leading
    assert _leading is None, "a process leads one training at a time"
    with Lead(world, seconds) as made:
        _leading = made
        try:
            yield made
        finally:
            _leading = None


def leading() -> Lead | None:
    """The Lead of this process, if it is rank 0 of a job whose other ranks were started along with it."""
    return _leading


class Line:
    """Another rank's side: its connection to rank 0. A context manager."""

    def __init__(self, world: World, seconds: float) -> None:
        """Raises RuntimeError if rank 0 is not met in that time."""
        self.store = world.store(seconds)
        self.store.set_timeout(timedelta(seconds=seconds))
        said = json.loads(self.store.get(_KEY))
        self._connection = socket.create_connection((world.address, said["port"]), timeout=seconds)
        self._connection.settimeout(None)
        _keep_alive(self._connection)
        self.result: str | None = None  # rank 0's last word; failed if it died
        self._to_blame = False  # this rank failed, or rank 0 does not live to say how the stage ended
        self._heard, self._finished = threading.Event(), threading.Event()
        self._say(op="hello", rank=world.rank, host=socket.gethostname(), pid=os.getpid(), token=said["token"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def word(self) -> dict[str, Any]:
        """What rank 0 says next: train or over. It may take hours; `over` with result failed if rank 0 died."""
        line = _line(self._connection)
        if not line:
            self._to_blame = True
            return {"op": "over", "result": "failed"}
        word: dict[str, Any] = json.loads(line)
        return word

    @property
    def group(self) -> dist.Store:
        """Where the ranks find each other for their collectives."""
        return dist.PrefixStore(_GROUP, self.store)

    def ready(self) -> None:
        self._say(op="ready")

    def watch(self) -> None:
        """From now on, end this process when rank 0 dies, or has failed while this one waits for it."""
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def wait(self) -> str:
        """Rank 0's last word, after the training."""
        self._finished.set()
        self._heard.wait()
        assert self.result is not None
        return self.result

    def give_up(self, error: BaseException) -> None:
        """Say why this rank fails, and end its process. Does not return."""
        if self.result is None:
            self._to_blame = True
            log.error("This rank failed.", exc_info=error)
            line = "".join(traceback.format_exception_only(error)).strip()
            trace = "".join(traceback.format_exception(error))
            with suppress(OSError):
                self._say(op="failed", error=line, traceback=trace, apart=isinstance(error, RanksApart))
            self._heard.wait(LAST_WORD_SECONDS)
        self._end()

    def _watch(self) -> None:
        word = self.word()
        assert word["op"] == "over", word
        self.result = word["result"]
        self._heard.set()
        # After any other end this rank is about to finish as well; not if rank 0 was interrupted within a step.
        if self.result == "failed" or not self._finished.wait(LAST_WORD_SECONDS):
            self._end()

    def _end(self) -> None:
        """Nothing of this process is worth unwinding."""
        log.info("Rank 0 says that the stage ended: %s.", self.result)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if self._to_blame else 0)

    def _say(self, **message: Any) -> None:
        _send(self._connection, **message)


def log_of(attempt: Path, rank: int) -> Path:
    """Where the log of a rank lies, below an attempt's folder."""
    return attempt / (f"log.rank{rank}" if rank else "log")


def _split(text: str) -> tuple[str, str]:
    """(error, traceback) of a reason."""
    line, _, rest = text.partition("\n")
    return line, rest and text


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # a kernel without IPv6 may know the option
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _keep_alive(connection: socket.socket) -> None:
    """Notice after 25 s that the other machine is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE", None) or getattr(socket, "TCP_KEEPALIVE", None)  # Linux | macOS
    for option, value in ((idle, 5), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _line(connection: socket.socket) -> bytes:
    """Up to a line's end, byte by byte: nothing of what follows is taken. Empty at the end of the stream."""
    line = b""
    while not line.endswith(b"\n"):
        try:
            got = connection.recv(1)
        except ConnectionResetError:
            got = b""
        if not got:
            return b""
        line += got
    return line


def _send(connection: socket.socket, **message: Any) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")
