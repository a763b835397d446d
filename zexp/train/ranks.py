"""The ranks of a training besides rank 0: what they do, and how rank 0 starts them where all are on its machine.

    python -m zexp.train.ranks STORE REQUEST     one of them, with torchrun's variables in its environment
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zexp.config.places import import_path
from zexp.store.attempt import Attempt
from zexp.store.folder import Store
from zexp.train import lifeline
from zexp.train.lifeline import Lead, Line
from zexp.train.logger import logging_to
from zexp.train.parallel import World
from zexp.train.signals import StopFlag

log = logging.getLogger(__name__)

LEAVE_SECONDS = 30.0  # how long the ranks that this process started may take to end


def follow(root: str | os.PathLike[str], request: Mapping[str, Any], world: World) -> str:
    """Be rank 1 or a later one of a stage until rank 0 says that it is over; how it ended. To call in the main thread.

    Whatever goes wrong ends this process instead, with exit code 1 if that is this rank's doing or rank 0 died, after
    rank 0 was told why. Writes attempts/<n>/log.rank<r> and nothing else.
    """
    from zexp.train import loop

    with StopFlag() as stop, Line(world, request["ranks"]["timeout_seconds"]) as line:
        word = line.word()
        if word["op"] == "over":
            return str(word["result"])
        store = Store(Path(root))
        with logging_to(lifeline.log_of(store.root / word["attempt"], world.rank)):
            line.watch()
            try:
                loop.accompany(store, request, world, line, word, stop)
            except BaseException as error:
                line.give_up(error)
            return line.wait()


@contextmanager
def gathered(store: Store, request: Mapping[str, Any], attempt: Attempt) -> Iterator[Lead | None]:
    """The Lead of the ranks that the request asks for; None for one rank.

    They are those of this job, or else are started beside this process and end with the block.
    """
    count = request["ranks"]["data"]
    if count == 1:
        yield None
        return
    lead = lifeline.leading()
    if lead is not None:
        yield lead
        return
    seconds = request["ranks"]["timeout_seconds"]
    with lifeline.lead(World(0, count), seconds) as lead:
        try:
            for rank in range(1, count):
                lead.processes[rank] = _start(rank, lead.world, store, request, attempt)
            yield lead
            lead.over("done")  # or diverged, or interrupted: it is all one to processes that end now
        finally:
            lead.over("failed")
            _end(lead.processes)


def _start(
    rank: int, world: World, store: Store, request: Mapping[str, Any], attempt: Attempt
) -> subprocess.Popen[bytes]:
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": world.address,
        "MASTER_PORT": str(world.port),
        "PYTHONPATH": import_path(os.environ.get("PYTHONPATH", "")),
        "PYTHONSAFEPATH": "1",  # the working directory is the user's: a file types.py in it must not replace Python's
    }
    environment = {key: value for key, value in os.environ.items() if key != "TORCHELASTIC_USE_AGENT_STORE"} | variables
    command = [sys.executable, "-m", "zexp.train.ranks", str(store.root), json.dumps(dict(request))]
    with open(lifeline.log_of(attempt.path, rank), "ab") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)


def _end(processes: Mapping[int, subprocess.Popen[bytes]]) -> None:
    """They were told; whoever does not end by itself is ended."""
    until = time.monotonic() + LEAVE_SECONDS
    for rank, process in processes.items():
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
            continue
        log.warning("Rank %d (process %d) does not end; it is killed.", rank, process.pid)
        process.kill()
        process.wait()


if __name__ == "__main__":
    follow(sys.argv[1], json.loads(sys.argv[2]), World.from_environment())
