"""The store: one folder a stage, named by its id, whose published result or states are the only truth.

    root/<kind>/<hash16>/   config.yaml  provenance.json  result/ | states/<tokens>/  attempts/<n>/  lease.<n>
    root/studies/<name>/    root/cache/

A folder that came with an archive may have elsewhere/ besides: manifests and facts of what is published in another store.

Store and StageFolder only look. What writes below a stage's folder is an Attempt (attempt.py), but for
config.yaml, provenance.json and the pins, which are the same whoever writes them.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zexp.config.errors import ConfigError
from zexp.store import files, lease
from zexp.store.attempt import Attempt, AttemptRecord
from zexp.store.errors import StoreError
from zexp.store.ids import SHORT, canonical_json, semantic_id, short

KINDS = ("tokenizer", "corpus", "packing", "tasks", "trajectory", "eval")
OPTIMIZER = "optimizer"  # the part of a state that only training reads; it may be dropped
_NUMBER = re.compile(r"0|[1-9]\d*")


@dataclass(frozen=True)
class Store:
    """A folder tree of results. Making a Store touches nothing on disk.

    patience: seconds for which a parent that has to be there is looked for again (an NFS client may not see for a minute
    what another one renamed).
    """

    root: Path
    lease_times: lease.LeaseTimes = lease.LeaseTimes()
    patience: float = 90.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root).expanduser().absolute())

    @property
    def cache(self) -> Path:
        """What may be deleted at any time."""
        return self.root / "cache"

    @property
    def hub(self) -> Path:
        """HF_HOME of processes that may not ask the Hugging Face hub; the environment may name another folder."""
        said = os.environ.get("HF_HOME")
        return Path(said).expanduser().absolute() if said else self.root / "hub"

    def study(self, name: str) -> Path:
        return self.root / "studies" / name

    def check_writable(self) -> None:
        """Raises ConfigError if no folder can be made there. Leaves no trace, so it can come first of all."""
        there = self.root
        while not os.path.lexists(there):
            there = there.parent
        probe = there / f".{secrets.token_hex(8)}.tmp"
        try:
            probe.mkdir()
            try:
                (probe / "probe").write_bytes(b"1")  # a full disk still makes folders
            finally:
                (probe / "probe").unlink(missing_ok=True)
                probe.rmdir()
        except OSError as error:
            raise ConfigError(
                f"store = '{self.root}': cannot write in '{there}': {error.strerror}.\n"
                "  Name a folder that this account can write: store=DIR, or ZEXP_STORE in the environment."
            ) from error

    def folder(self, kind: str, id: str) -> StageFolder:
        """The folder of a stage, there or not. id: all 64 hex digits."""
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}.")
        return StageFolder(self, kind, id, self.root / kind / short(id))

    def folders(self, kind: str) -> Iterator[StageFolder]:
        """Every folder of a kind that has a config.yaml, by id. Reads each config.yaml."""
        yield from self.find("", kind)

    def find(self, prefix: str, kind: str | None = None) -> list[StageFolder]:
        """The stages whose id begins with prefix (of any length), of one kind or all, in order."""
        found = []
        for each in KINDS if kind is None else (kind,):
            try:
                names = sorted(os.listdir(self.root / each))
            except (FileNotFoundError, NotADirectoryError):
                continue
            for name in names:
                path = self.root / each / name / "config.yaml"
                if name.startswith(prefix[:SHORT]) and len(name) == SHORT and path.is_file():
                    config = files.read_yaml(path)
                    id = config.get("id") if isinstance(config, dict) else None
                    if not isinstance(id, str) or not id.startswith(name):
                        raise StoreError(f"{path} has not the id that its folder is named by.")
                    if id.startswith(prefix):
                        found.append(self.folder(each, id))
        return found

    def wait_for(self, path: Path) -> bool:
        """True as soon as path is there, False after `patience`. Listing its parent makes an NFS client look again."""
        end = time.monotonic() + self.patience
        pause = 0.1
        while True:
            try:
                if path.name in os.listdir(path.parent):
                    return True
            except (FileNotFoundError, NotADirectoryError):
                pass  # the parent may be what is not visible yet
            left = end - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, 2.0)


# Whoever decides sees a lease unchanged for one timeout of its own time. Looking once there is only the file's time: clocks may
# differ by a minute or two, and an NFS client may show it a minute late.
_SILENT_TIMEOUTS = 4


def named_store() -> str:
    """The store that is meant where none is named: ZEXP_STORE, else `store` in the working directory."""
    return os.environ.get("ZEXP_STORE", "store")


@dataclass(frozen=True)
class StageFolder:
    """Where the stage of a kind with an id lies or will lie. Made by Store.folder()."""

    store: Store
    kind: str
    id: str
    path: Path

    def __str__(self) -> str:
        return f"{self.kind}/{self.path.name}"

    def create(self, semantic: dict[str, Any], provenance: dict[str, Any]) -> None:
        """Write config.yaml and provenance.json, once. On later use compare instead.

        Raises StoreError if semantic is not what the id was made from, or if the folder belongs to another id
        (two that agree in 16 digits) or holds another semantic block.
        """
        if (made := semantic_id(semantic)) != self.id:
            raise StoreError(f"{self}: this semantic block has the id {made}, not {self.id}.")
        if (self.path / "config.yaml").is_file():
            if canonical_json(self.semantic()) != canonical_json(semantic):
                raise StoreError(f"{self.path / 'config.yaml'} holds another semantic block; was it edited?")
            return
        self.path.mkdir(parents=True, exist_ok=True)
        # config.yaml last: where it is, the rest is. Two makers write the same text.
        files.write_json(self.path / "provenance.json", provenance)
        files.write_yaml(self.path / "config.yaml", {"kind": self.kind, "id": self.id, "semantic": semantic})

    def semantic(self) -> dict[str, Any]:
        """The semantic block of config.yaml. Raises StoreError if there is none or it is another stage's."""
        path = self.path / "config.yaml"
        try:
            config = files.read_yaml(path)
        except FileNotFoundError:
            raise StoreError(f"{path} is missing: {self.kind} {self.id} is not in this store.") from None
        if not isinstance(config, dict) or config.get("id") != self.id or config.get("kind") != self.kind:
            raise StoreError(f"{path} is not the config of {self.kind} {self.id}.")
        semantic: dict[str, Any] = config["semantic"]
        return semantic

    def provenance(self) -> dict[str, Any]:
        value: dict[str, Any] = files.read_json(self.path / "provenance.json")
        return value

    def required(self, place: str = "result") -> Path:
        """The published "result" or "states/<tokens>" that somebody else has made. Raises StoreError if it is not there."""
        path = self.path / place
        if self.store.wait_for(path) and (found := _published(path)) is not None:
            return found
        there = f" It has states at: {', '.join(map(str, self.states())) or 'none'}." if self.kind == "trajectory" else ""
        raise StoreError(f"{self.path} has no {place}: it was never made, or it was removed.{there} Run the study again.")

    @property
    def result(self) -> Path | None:
        """The published result, or None. (A trajectory has states instead.)"""
        return _published(self.path / "result")

    def state(self, tokens: int) -> Path | None:
        """The published state at a token count, or None."""
        return _published(self.path / "states" / str(tokens))

    def trainable(self, tokens: int) -> Path | None:
        """The published state at a token count if training can go on from it: its optimizer part is there."""
        state = self.state(tokens)
        return state if state is not None and (state / OPTIMIZER).is_dir() else None

    def states(self) -> list[int]:
        """The token counts of all published states, ascending."""
        return [tokens for tokens in _numbers(self.path / "states") if self.state(tokens)]

    @property
    def elsewhere(self) -> Path:
        """What an archive told of results and states that it did not carry: elsewhere/<place>/manifest.json, state.json.

        Never in the place of the thing itself: nothing can be trained from it or scored, and a run makes it again.
        """
        return self.path / "elsewhere"

    def reported(self) -> dict[int, Path]:
        """Token count -> folder with the manifest and state.json, of all states that were made here or elsewhere, ascending."""
        found = {tokens: path for tokens in _numbers(self.elsewhere / "states") if (path := self._told(f"states/{tokens}"))}
        found |= {tokens: path for tokens in self.states() if (path := self.state(tokens))}
        return dict(sorted(found.items()))

    @property
    def reported_result(self) -> Path | None:
        """The published result here, or what an archive told of it; None if neither is there."""
        return self.result or self._told("result")

    def _told(self, place: str) -> Path | None:
        return _published(self.elsewhere / place)

    def diverged(self) -> dict[str, Any] | None:
        """{tokens, reason} if this trajectory ended by diverging."""
        try:
            value: dict[str, Any] = files.read_json(self.path / "diverged.json")
        except FileNotFoundError:
            return None
        return value

    def pin(self, tokens: int, *, optimizer: bool = False) -> None:
        """Keep the state at this token count, there or to come: some study scores it. optimizer: some study forks it."""
        pins = self.path / "pins"
        pins.mkdir(parents=True, exist_ok=True)
        (pins / str(tokens)).touch()
        if optimizer:
            (pins / f"{tokens}.{OPTIMIZER}").touch()

    def keeps_optimizer(self, tokens: int) -> bool:
        """True if some study forks the state at this token count."""
        return (self.path / "pins" / f"{tokens}.{OPTIMIZER}").exists()

    def pins(self) -> list[int]:
        return _numbers(self.path / "pins")

    def verify(self, path: Path, *, contents: bool = True) -> None:
        """Check a published folder (self.result, self.state(…)) against its manifest's checksums.

        contents=False compares names and sizes only. Raises StoreError naming each bad file.
        """
        files.verify_manifest(path, contents=contents)

    def attempt(
        self,
        request: dict[str, Any],
        *,
        done: Callable[[], bool] | None = None,
        on_wait: Callable[[dict[str, Any], float], None] | None = None,
    ) -> Attempt | None:
        """Take the lease and open attempts/<n>, with request in request.yaml. Entering starts the heartbeat.

        While somebody alive holds the lease, wait; None as soon as done() is true (looked at before and after
        taking the lease, too). on_wait(facts of the holder, seconds waited) is called at every look (default
        every 0.5 s) and may raise to give up.
        """
        taken = lease.acquire(self.path, self.store.lease_times, done=done, on_wait=on_wait)
        if taken is None:
            return None
        try:
            return Attempt(self, taken, request)
        except BaseException:
            taken.release()
            raise

    def attempts(self) -> list[AttemptRecord]:
        """What attempts left behind, oldest first."""
        return [AttemptRecord(self.path / "attempts" / str(n), n) for n in _numbers(self.path / "attempts")]

    def last_attempt(self) -> AttemptRecord | None:
        attempts = self.attempts()
        return attempts[-1] if attempts else None

    def holder(self) -> dict[str, Any] | None:
        """{host, pid, …, n, silent_seconds} of a holder that may be alive, or None: of one on another machine that has not
        beaten for four timeouts, too.

        For showing, not for deciding: silent_seconds compares the file's time with this machine's clock.
        """
        seen = lease.read(self.path)
        if seen is None or seen.free:
            return None
        try:
            beat = (self.path / f"lease.{seen.n}").stat().st_mtime
        except FileNotFoundError:
            return None
        silent = max(0.0, time.time() - beat)
        if silent > _SILENT_TIMEOUTS * self.store.lease_times.timeout:
            return None
        return {**seen.facts, "n": seen.n, "silent_seconds": silent}


def _numbers(folder: Path) -> list[int]:
    """The names in a folder that are numbers, ascending; none if it is not there."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if _NUMBER.fullmatch(name))


def _published(path: Path) -> Path | None:
    # The rename brought the whole folder; the manifest tells it from a folder that somebody made by hand.
    return path if (path / files.MANIFEST).is_file() else None
