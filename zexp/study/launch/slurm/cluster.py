"""SLURM's commands: what the cluster offers, what it says of jobs. Nothing here decides anything about a stage.

Every call is one process. A controller that does not answer is no answer (None), never "there are no jobs".
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from zexp.config.errors import ConfigError

T = TypeVar("T")
COMMAND_SECONDS = 60.0
AGAIN_SECONDS = 5.0
ANSWER_SECONDS = 300.0  # for how long a controller that is away is asked again, once something of a study is under way
SBATCH = "SBATCH_"  # variables that stand for options of sbatch
ACCOUNT = "SBATCH_ACCOUNT"
NEEDED = ("sbatch", "srun", "squeue", "scontrol", "sinfo", "scancel")
# States of a job that will not run again by itself. squeue shows them for some minutes, sacct for ever.
OVER = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED",
    "REVOKED",
}  # fmt: skip


@dataclass(frozen=True)
class Partition:
    """One kind of node of one partition. limit_min: infinity without one."""

    name: str
    default: bool
    limit_min: float
    gpus: int  # of a node
    cpus: int
    mem_mb: int
    nodes: int


@dataclass(frozen=True)
class Queued:
    """What the scheduler says of a job. reason: why it waits, or why it ended."""

    state: str
    reason: str = ""
    node: str = ""

    @property
    def over(self) -> bool:
        return self.state in OVER


class NoAnswer(ConfigError):
    """The controller did not answer."""


def patiently(ask: Callable[[], T]) -> T:
    """What ask() returns; it is asked again while the controller does not answer, for some minutes (a restart, a failover)."""
    end = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            return ask()
        except NoAnswer:
            if time.monotonic() >= end:
                raise
            time.sleep(AGAIN_SECONDS)


def require() -> None:
    """Raises ConfigError if SLURM's commands are not on the path."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        raise ConfigError(
            f"hydra/launcher=slurm: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not on the path. Run it on a "
            "login node of a SLURM cluster, or take hydra/launcher=local."
        )


def partitions() -> list[Partition]:
    """What the partitions offer. Raises ConfigError if the cluster does not answer."""
    found = []
    for line in _asked("sinfo", "-a", "-h", "-e", "-o", "%P|%l|%G|%c|%m|%D").splitlines():
        name, limit, gres, cpus, memory, nodes = line.strip().split("|")
        found.append(
            Partition(
                name=name.rstrip("*"),
                default=name.endswith("*"),
                limit_min=minutes_of(limit),
                gpus=gpus_of(gres),
                cpus=int(cpus.rstrip("+")),
                mem_mb=int(memory.rstrip("+")),
                nodes=int(nodes),
            )
        )
    return found


def max_array_size() -> int:
    """How many elements an array may have. Raises ConfigError if the cluster does not answer."""
    return max(1, int(_setting("MaxArraySize")))


def name() -> str:
    """What the cluster is called. Raises ConfigError if it does not answer."""
    return _setting("ClusterName")


def _setting(key: str) -> str:
    found = re.search(rf"^{key}\s*=\s*(\S+)", _asked("scontrol", "show", "config"), re.MULTILINE)
    if found is None:
        raise ConfigError(f"`scontrol show config` names no {key}.")
    return found[1]


def refusal(arguments: Sequence[str], *, account: bool) -> str | None:
    """Why sbatch would refuse a job with these options (account, QOS, limits …), or None. Nothing is queued. account: they name
    one."""
    with outside_allocations(account=account):
        done = _run("sbatch", "--test-only", *arguments, "--wrap=true")
    if done is None or done.returncode == 0:
        return None
    return _said(done.stderr)


@contextlib.contextmanager
def outside_allocations(*, account: bool) -> Iterator[None]:
    """The variables of a job that this command runs in are not there: they are not meant for the jobs that it submits. Nor are
    sbatch's own, which would overrule the options of a script, and so what was asked for; but for the account that people put
    into their shells, unless one is asked for (account)."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", *(() if account else (ACCOUNT,)))
    theirs = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", SBATCH)) and name not in kept
    }
    for name in theirs:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(theirs)


def queue(names: Iterable[str]) -> dict[str, Queued] | None:
    """The jobs of these names that the controller knows, by id (`12`, `12_3`); None if it does not answer.

    Those that have ended are among them for some minutes (MinJobAge).
    """
    done = _run("squeue", "-a", "-h", "-r", "-t", "all", "-n", ",".join(names), "-o", "%i|%T|%r|%N")
    if done is None or done.returncode != 0:
        return None
    found = {}
    for line in done.stdout.splitlines():
        id, state, reason, node = line.strip().split("|", 3)
        found[id] = Queued(state, "" if reason == "None" else reason, node)
    return found


def about(ids: Iterable[str], found: Mapping[str, Queued]) -> dict[str, Queued]:
    """What an answer of queue() or ended() says of those of these jobs that it knows. Of elements that were cancelled while all
    of the rest of their array waited, SLURM only keeps the array's own entry."""
    return {id: job for id in ids if (job := found.get(id) or found.get(id.partition("_")[0])) is not None}


def ended(ids: Sequence[str]) -> dict[str, Queued] | None:
    """What the accounting says of jobs that the controller has forgotten; None if it does not answer or there is none."""
    arrays = dict.fromkeys(id.partition("_")[0] for id in ids)
    done = _run("sacct", "-n", "-X", "-P", "-j", ",".join(arrays), "-o", "JobID,State,NodeList")
    if done is None or done.returncode != 0:
        return None
    found: dict[str, Queued] = {}
    for line in done.stdout.splitlines():
        id, state, node = line.strip().split("|", 2)
        word, _, rest = state.partition(" ")  # CANCELLED by 1000
        found |= dict.fromkeys(elements_of(id), Queued(word, rest, "" if node == "None assigned" else node))
    return found


def elements_of(id: str) -> list[str]:
    """The jobs in an id as sacct writes elements that never started: `12_[0-2,5%4]` is 12_0, 12_1, 12_2, 12_5."""
    array, bracket, rest = id.partition("_[")
    if not bracket:
        return [id]
    found = []
    for part in rest.rstrip("]").partition("%")[0].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if match is not None:  # else the list is cut off (`...`); of the rest nothing is known
            first, last, step = match.groups()
            found += [f"{array}_{number}" for number in range(int(first), int(last or first) + 1, int(step or 1))]
    return found


def cancel(ids: Sequence[str]) -> None:
    """End jobs, whether they wait or run; those that are over already are no error. Raises ConfigError if SLURM does not answer or
    refuses."""
    refusals = []
    for start in range(0, len(ids), 500):
        done = _run("scancel", *ids[start : start + 500])
        if done is None:
            refusals.append("the controller does not answer")
        elif done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if not re.search(r"(?i)invalid job id|already complet", line)]
            refusals += [_said("\n".join(lines))] if lines else []
    if refusals:
        raise ConfigError(f"`scancel` failed: {' '.join(dict.fromkeys(refusals))}")


def cancel_named(name: str) -> None:
    """End all jobs of a name. Raises ConfigError if SLURM does not answer or refuses."""
    done = _run("scancel", "--name", name)
    if done is None or done.returncode != 0:
        raise ConfigError(f"`scancel --name {name}` failed: {'the controller does not answer' if done is None else _said(done.stderr)}")


def requeue(id: str) -> str | None:
    """Put a running job back into the queue; why that did not work, or None."""
    done = _run("scontrol", "requeue", id)
    if done is None:
        return "the controller did not answer"
    return None if done.returncode == 0 else _said(done.stderr)


def job(id: str) -> Queued | None:
    """State and reason of one job, from inside it; None if the controller does not answer."""
    done = _run("scontrol", "show", "job", "-o", id)
    found = None if done is None else re.search(r"\bJobState=(\w+)\s+Reason=(\w+)", done.stdout)
    return None if found is None else Queued(found[1], found[2])


def minutes_of(limit: str) -> float:
    """SLURM's time formats: `30:00`, `4:00:00`, `2-00:00:00`, `infinite`."""
    if limit.lower() in ("infinite", "unlimited", "n/a", "partition_limit"):
        return math.inf
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = (0, *parts)[-3:] if len(parts) > 1 else (0, parts[0], 0)
    return (int(days or 0) * 24 + hours) * 60 + minutes + seconds / 60


def gpus_of(gres: str) -> int:
    """GPUs of a node in what sinfo calls GRES: `gpu:a100:4(S:0-1),gpu:2,nvme:1` has 6."""
    count = 0
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = entry.strip().split(":")
        if name == "gpu":
            count += int(rest[-1]) if rest and rest[-1].isdigit() else 1
    return count


def _asked(*command: str) -> str:
    done = _run(*command)
    if done is None:
        raise NoAnswer(f"SLURM does not answer (`{' '.join(command[:3])}`). Is its controller up? `scontrol ping` tells.")
    if done.returncode != 0:
        away = re.search(r"(?i)unable to contact|timed out|connect", done.stderr) is not None
        raise (NoAnswer if away else ConfigError)(f"`{' '.join(command[:3])}` failed: {_said(done.stderr)}")
    return done.stdout


def _run(*command: str) -> subprocess.CompletedProcess[str] | None:
    try:
        # sacct cuts long lists of elements otherwise.
        environment = {**os.environ, "SLURM_BITSTR_LEN": "0"}
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, env=environment)
    except (subprocess.TimeoutExpired, FileNotFoundError):  # a store may be looked at where there is no SLURM
        return None


def _said(stderr: str) -> str:
    lines = [re.sub(r"^\w+: (error: )?", "", line) for line in stderr.strip().splitlines()]
    return " ".join(dict.fromkeys(line for line in lines if line)) or "no reason was given"
