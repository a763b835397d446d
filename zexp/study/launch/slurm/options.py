"""What a user says about jobs (conf/hydra/launcher/slurm.yaml), and the shape of the job that a stage asks for.

The names are submitit's, which Hydra's own submitit launcher made known.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zexp.study import ranks
from zexp.study.launch.base import Stage
from zexp.study.launch.options import WHERE, LauncherOptions, is_number, is_whole

# Stage kind -> the table of the options that may say more about its jobs.
CLASSES = {"segment": "train", "eval": "eval", "tokenizer": "data", "corpus": "data", "packing": "data", "tasks": "data"}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a job asks for; None = as the options above this table say."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None  # None everywhere = the stage's threads
    mem_gb: float | None = None  # of a node; None everywhere = the cluster's default
    timeout_min: int | None = None  # a longer training takes several allocations
    stages_per_job: int | None = None  # so many stages share a job
    pack_minutes: float | None = None  # stages share a job until it is estimated to be so long; 0 = they do not
    setup: Sequence[str] | None = None  # shell lines in front of Python
    additional_parameters: Mapping[str, Any] | None = None  # any other option of sbatch


@dataclass(frozen=True, kw_only=True)
class SlurmOptions(LauncherOptions):
    """Jobs of a SLURM cluster."""

    backend: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    timeout_min: int = 240
    stages_per_job: int | None = None
    pack_minutes: float = 0.0
    setup: Sequence[str] = ()
    additional_parameters: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)  # the keys of Resources, for segments
    eval: Mapping[str, Any] = field(default_factory=dict)  # … for evaluations
    data: Mapping[str, Any] = field(default_factory=dict)  # … for tokenizers, corpora, packings and tasks
    max_parallel: int | None = None  # at most so many jobs of this study at once; None = no limit
    signal_delay_s: int = 120  # so long before its time limit a job is told to write a state and requeue itself
    max_fruitless: int = 3  # after so many restarts in a row without a new state a job gives up
    poll_seconds: float = 10.0  # how often the following command looks
    visible_seconds: float = 45.0  # a job that has run for so long without a trace in the store does not see it
    snapshot: bool = True  # jobs run a copy of the code as it was when they were submitted
    offline: bool = True  # jobs do not ask the Hugging Face hub: this machine has fetched what they need

    def problems(self) -> list[str]:
        found = super().problems()
        for key in ("stages_per_job", "max_parallel"):
            value = getattr(self, key)
            if value is not None and (not is_whole(value) or value < 1):
                found.append(f"{WHERE}.{key} = {value!r}: give a number from 1 on, or null.")
        for key in ("signal_delay_s", "max_fruitless"):
            value = getattr(self, key)
            if not is_whole(value) or value < 1:
                found.append(f"{WHERE}.{key} = {value!r}: give a whole number from 1 on.")
        for key in ("poll_seconds", "visible_seconds"):
            value = getattr(self, key)
            if not is_number(value) or value <= 0:
                found.append(f"{WHERE}.{key} = {value!r}: give seconds above 0.")
        known = [one.name for one in dataclasses.fields(Resources)]
        found += _wrong({name: getattr(self, name) for name in known}, WHERE)
        for name in dict.fromkeys(CLASSES.values()):
            table = getattr(self, name)
            found += [
                f"{WHERE}.{name}.{key}: there is no such option. There are: {', '.join(known)}."
                for key in table
                if key not in known
            ]
            found += _wrong({key: value for key, value in table.items() if key in known}, f"{WHERE}.{name}")
        if not found:
            found += [
                f"{WHERE}.timeout_min = {limit} is not longer than signal_delay_s = {self.signal_delay_s} seconds, "
                "so a job would be told to stop as it starts. Raise the one or lower the other."
                for limit in sorted({self.resources(name).timeout_min or 0 for name in set(CLASSES.values())})
                if limit * 60 <= self.signal_delay_s
            ]
        return found

    def resources(self, name: str) -> Resources:
        """Of one class (train, eval, data): its own table over the common values."""
        keys = [one.name for one in dataclasses.fields(Resources)]
        own = {key: value for key, value in getattr(self, name).items() if value is not None}
        return Resources(**{key: own.get(key, getattr(self, key)) for key in keys})


def _wrong(values: Mapping[str, Any], where: str) -> list[str]:
    """What is wrong with the keys of Resources."""
    found = []
    for key in ("gpus_per_node", "cpus_per_task", "timeout_min", "stages_per_job"):
        value, least = values.get(key), 0 if key == "gpus_per_node" else 1
        if value is not None and (not is_whole(value) or value < least):
            text = f"{where}.{key} = {value!r}: give a whole number from {least} on."
            if key != "stages_per_job" or where != WHERE:  # which the options themselves check
                found.append(text)
    for key, range in (("mem_gb", "above 0"), ("pack_minutes", "from 0 on")):
        value = values.get(key)
        if value is not None and (not is_number(value) or value < 0 or (key == "mem_gb" and value == 0)):
            found.append(f"{where}.{key} = {value!r}: give a number {range}.")
    for key in ("partition", "account", "qos", "constraint"):
        value = values.get(key)
        if value is not None and (not isinstance(value, str) or not value):
            found.append(f"{where}.{key} = {value!r}: give a name.")
    setup = values.get("setup")
    if setup is not None and (isinstance(setup, str) or not all(isinstance(line, str) for line in setup)):
        found.append(f"{where}.setup = {setup!r}: give a list of shell lines.")
    extra = values.get("additional_parameters")
    if extra is not None and not isinstance(extra, Mapping):
        found.append(f"{where}.additional_parameters = {extra!r}: give a table, e.g. {{reservation: mine}}.")
    elif extra is not None and (ours := sorted({key.replace("_", "-") for key in extra} & _OURS)):
        found.append(f"{where}.additional_parameters: {', '.join(ours)} {'is' if len(ours) == 1 else 'are'} set by zexp itself.")
    return found


# Options of sbatch that the launcher decides, or for which there is a key of its own.
_OURS = {
    "array", "dependency", "output", "error", "open-mode", "signal", "requeue", "no-requeue", "kill-on-invalid-dep",
    "nodes", "ntasks-per-node", "ntasks", "partition", "account", "qos", "constraint", "gpus-per-node", "cpus-per-task",
    "mem", "time", "job-name", "wrap",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What one job asks for; stages with equal shapes may share an array.

    parameters: of submitit's SlurmExecutor, sorted, so that shapes can be compared.
    """

    kind: str  # train | eval | data
    partition: str | None
    nodes: int
    gpus_per_node: int
    cpus_per_task: int
    tasks_per_node: int
    timeout_min: int
    mem_gb: float | None
    others: tuple[tuple[str, str], ...]  # account, qos, constraint and further options, as texts
    setup: tuple[str, ...]

    @property
    def tasks(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def names_account(self) -> bool:
        return any(key == "account" for key, _ in self.others)

    def parameters(self) -> dict[str, Any]:
        """For submitit."""
        mem = {} if self.mem_gb is None else {"mem": f"{max(1, round(self.mem_gb * 1024))}M"}
        partition = {} if self.partition is None else {"partition": self.partition}
        gpus = {"gpus_per_node": self.gpus_per_node} if self.gpus_per_node else {}
        own = {key: value for key, value in self.others if key in ("account", "qos", "constraint")}
        extra = {key: (True if value == "true" else value) for key, value in self.others if key not in own}
        return {
            **partition,
            **gpus,
            **mem,
            **own,
            "nodes": self.nodes,
            "ntasks_per_node": self.tasks_per_node,
            "cpus_per_task": self.cpus_per_task,
            "time": self.timeout_min,
            "additional_parameters": extra,
        }

    def arguments(self) -> list[str]:
        """The same for sbatch's own command line."""
        gpus = [f"--gpus-per-node={self.gpus_per_node}"] if self.gpus_per_node else []
        memory = [] if self.mem_gb is None else [f"--mem={max(1, round(self.mem_gb * 1024))}M"]
        return [
            *([f"--partition={self.partition}"] if self.partition else []),
            f"--nodes={self.nodes}",
            f"--ntasks-per-node={self.tasks_per_node}",
            f"--cpus-per-task={self.cpus_per_task}",
            f"--time={self.timeout_min}",
            *gpus,
            *memory,
            *(f"--{key}" if value == "true" else f"--{key}={value}" for key, value in self.others),
        ]

    def line(self) -> str:
        """For a person: `1 node, 2 GPUs, 4 CPUs, 4 h in gpu`."""
        parts = [f"{self.nodes} node{'s' * (self.nodes != 1)}"]
        if self.gpus_per_node:
            parts.append(f"{self.gpus_per_node} GPU{'s' * (self.gpus_per_node != 1)}{' each' * (self.nodes > 1)}")
        cpus = self.cpus_per_task * self.tasks_per_node
        parts.append(f"{cpus} CPU{'s' * (cpus != 1)}{' each' * (self.nodes > 1)}")
        if self.mem_gb is not None:
            parts.append(f"{self.mem_gb:g} GB")
        hours, minutes = divmod(self.timeout_min, 60)
        limit = f"{hours} h {minutes} min" if hours and minutes else f"{hours} h" if hours else f"{minutes} min"
        where = f" in {self.partition}" if self.partition else ""
        return f"{', '.join(parts)}, at most {limit}{where}"


def shape_of(stage: Stage, options: SlurmOptions) -> Shape:
    """The shape of the job that runs a stage."""
    name = CLASSES[stage.kind]
    own = options.resources(name)
    threads = int(stage.request.get("threads", 1))
    nodes, count = int(stage.request.get("ranks", {}).get("nodes", 1)), ranks.count(stage.request)
    # Ranks of one machine are processes of one task; over several nodes each rank is a task (zexp.study.ranks).
    tasks, processes = (count // nodes, 1) if nodes > 1 else (1, count)
    others = {
        **{key: str(getattr(own, key)) for key in ("account", "qos", "constraint") if getattr(own, key) is not None},
        **{
            str(key).replace("_", "-"): "true" if value is True else str(value)
            for key, value in (own.additional_parameters or {}).items()
            if value is not None and value is not False
        },
    }
    return Shape(
        kind=name,
        partition=own.partition,
        nodes=nodes,
        gpus_per_node=own.gpus_per_node or 0,
        cpus_per_task=own.cpus_per_task or threads * processes,
        tasks_per_node=tasks,
        timeout_min=own.timeout_min or options.timeout_min,
        mem_gb=own.mem_gb,
        others=tuple(sorted(others.items())),
        setup=tuple(own.setup or ()),
    )


def environment_lines(variables: Mapping[str, str]) -> list[str]:
    """Shell lines that set variables, whatever their values."""
    for name in variables:
        assert re.fullmatch(r"[A-Za-z_]\w*", name), name
    return [f"export {name}={shlex.quote(value)}" for name, value in sorted(variables.items())]
