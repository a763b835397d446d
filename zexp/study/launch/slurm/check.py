"""What a cluster would refuse, found before anything is queued."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from zexp.config.errors import Problems
from zexp.study.launch.slurm import cluster
from zexp.study.launch.slurm.cluster import Partition
from zexp.study.launch.slurm.options import Shape


def problems_of(shapes: Collection[Shape], there: Sequence[Partition]) -> Problems:
    """Shapes against what the partitions offer: unknown ones, more than a node has, longer than they allow."""
    problems = Problems()
    for shape in shapes:
        where = f"hydra.launcher.{shape.kind}"
        if shape.partition is None:
            names = [one.name for one in there if one.default]
            if not names:
                known = ", ".join(sorted({one.name for one in there}))
                problems.add(f"hydra.launcher.partition is not set, and the cluster has no default. There are: {known}.")
                continue
        else:
            names = [name.strip() for name in shape.partition.split(",")]
        known_names = {one.name for one in there}
        unknown = [name for name in names if name not in known_names]
        if unknown:
            problems.add(
                f"hydra.launcher.partition = {shape.partition!r}: the cluster has no partition {', '.join(unknown)}. "
                f"There are: {', '.join(sorted(known_names))}."
            )
            continue
        own = [one for one in there if one.name in names]
        said = ", ".join(names)
        for key, wanted, most, unit in (
            ("gpus_per_node", shape.gpus_per_node, max(one.gpus for one in own), "GPUs"),
            ("cpus_per_task", shape.cpus_per_task * shape.tasks_per_node, max(one.cpus for one in own), "CPUs"),
            ("mem_gb", shape.mem_gb or 0, max(one.mem_mb for one in own) / 1024, "GB"),
        ):
            if wanted > most:
                problems.add(f"{where}.{key}: {wanted:g} {unit} a node, but no node of {said} has more than {most:.4g}. Ask for fewer.")
        longest = max(one.limit_min for one in own)
        if shape.timeout_min > longest:
            problems.add(
                f"{where}.timeout_min = {shape.timeout_min}: {said} allows {longest:g} minutes. Take that: a longer "
                "training takes several allocations."
            )
        nodes = sum(one.nodes for one in own)
        if shape.nodes > nodes:
            problems.add(f"parallelism.nodes = {shape.nodes}: {said} has {nodes} nodes.")
    return problems


def check(shapes: Collection[Shape]) -> list[Partition]:
    """Raises ConfigError with everything that the cluster would refuse, accounts, QOS and limits of users included: sbatch is
    asked about a job of each shape, which it is not given. Returns the partitions that these shapes go to."""
    there = cluster.partitions()
    problems = problems_of(shapes, there)
    problems.raise_if_any()
    for shape in shapes:
        if refusal := cluster.refusal(shape.arguments(), account=shape.names_account):
            problems.add(f"sbatch would refuse a job of {shape.line()}: {refusal}.")
    problems.raise_if_any()
    names = {name.strip() for shape in shapes if shape.partition is not None for name in shape.partition.split(",")}
    return [one for one in there if one.name in names or (one.default and any(shape.partition is None for shape in shapes))]
