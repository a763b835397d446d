"""A training by several processes: what of the config says so, whether it can be, and what each process of a job calls.

A *rank* is one process with a copy of the model. `parallelism.data` ranks train one segment, `data / nodes` on each of
`parallelism.nodes` machines. Every other stage (data, evaluation) has one process whatever the config says.

How a launcher starts a stage whose request has ranks = {data: W, nodes: N, …}:

- N = 1: one process, as any stage (`stages.run_stage`); it starts W - 1 more beside it.
- N > 1: one job of W tasks, W / N a node, that all start at once. *Each* task calls

      run_task(store_root, request)         the same request (base.Stage.full_request()) in each

  in its main thread and ends with exit code 0 when that returns. The answer of rank 0 says how the stage ended;
  the others answer "interrupted", "done", … as rank 0 told them, and nobody needs to read that. A rank that fails
  does not return: it ends its process with exit code 1 (the code of a killed one is the signal's), after rank 0
  has written failure.json. So `srun --kill-on-bad-exit=1` is right, and so is doing without.

Which environment variables it reads (zexp.train.parallel.World.from_environment), the first complete set of

- torchrun's: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT;
- SLURM's, as srun gives them to each task: SLURM_PROCID, SLURM_NTASKS (or SLURM_STEP_NUM_TASKS), SLURM_LOCALID,
  SLURM_STEP_NODELIST (or SLURM_JOB_NODELIST, SLURM_NODELIST), SLURM_JOB_ID, SLURM_STEP_ID. The meeting point is the
  first node of the list and a port from 15000 to 29999 that is made of the two ids; MASTER_ADDR and MASTER_PORT replace them.
  Of CUDA_VISIBLE_DEVICES a task may see its own GPU alone or all of the node's: then number SLURM_LOCALID is its own.

Nodes must reach each other by these names at any unprivileged port, see one store, and be of one kind.
Signals: SIGTERM or SIGUSR2 to any one task, or to all, makes all write a state at the same step and stop.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zexp.config.errors import Problems
from zexp.config.schema import Parallelism, Run

if TYPE_CHECKING:
    from zexp.store.lease import LeaseTimes
    from zexp.study.stages import Ended, Result, Watcher
    from zexp.train.phases import PhaseSpan


def request(parallelism: Parallelism) -> dict[str, Any]:
    """What a segment's request says of its ranks."""
    return {
        "data": parallelism.data,
        "nodes": parallelism.nodes,
        "timeout_seconds": parallelism.timeout_seconds,
    }


def count(request: Mapping[str, Any]) -> int:
    """The ranks of a stage, whatever its kind."""
    return int(request.get("ranks", {}).get("data", 1))


def check(parallelism: Parallelism, launcher: str, problems: Problems) -> None:
    """What is wrong whatever is trained. launcher: hydra.launcher.backend."""
    data, nodes = parallelism.data, parallelism.nodes
    if not 0 < parallelism.timeout_seconds < math.inf:
        problems.add(f"parallelism.timeout_seconds = {parallelism.timeout_seconds} must be a finite number above 0.")
    if nodes < 1:
        problems.add(f"parallelism.nodes = {nodes}: it must be at least 1.")
    elif data >= 1 and data % nodes:
        problems.add(
            f"parallelism.nodes = {nodes} does not divide parallelism.data = {data}, the ranks over all nodes: each "
            f"node has as many.\n  Set parallelism.data to {nodes} or a multiple of it, or parallelism.nodes to a divisor "
            f"of {data}."
        )
    if nodes > 1 and launcher == "local":
        problems.add(
            f"parallelism.nodes = {nodes}: the local launcher has this one machine.\n"
            "  Add hydra/launcher=slurm, or set parallelism.nodes to 1: parallelism.data ranks then run on this one."
        )


def check_batches(run: Run, spans: Sequence[PhaseSpan], problems: Problems) -> None:
    """Every rank reads the same number of sequences of every global batch."""
    ranks = run.parallelism.data
    if ranks <= 1:
        return
    for span in spans:
        phase = run.phases.get(span.name, run.anneal)
        sequences = span.batch_tokens // run.seq_len
        if phase is None or phase.batch_tokens is None or sequences % ranks == 0:
            continue  # one that is its parent's is named there
        key = f"phases.{span.name}" if span.name in run.phases else span.name
        fitting = [n for n in range(1, sequences + 1) if sequences % n == 0]
        step = ranks * run.seq_len
        batches = sorted({max(step, span.batch_tokens // step * step), (span.batch_tokens // step + 1) * step})
        problems.add(
            f"parallelism.data = {ranks}: {key}.batch_tokens = {span.batch_tokens} is {sequences} sequences of "
            f"{run.seq_len}, which {ranks} ranks cannot share evenly.\n"
            f"  Choose parallelism.data among {', '.join(map(str, fitting))} (the result stays the same), or take "
            f"{key}.batch_tokens = {' or '.join(map(str, batches))} (another result)."
        )


def run_task(
    root: str | Path,
    request: dict[str, Any],
    *,
    handlers: Mapping[str, str] | None = None,
    watcher: Watcher | None = None,
    times: LeaseTimes | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Ended:
    """Run a stage of several ranks as the rank that this process is; see the head of this file.

    handlers, watcher, times: as run_stage has them, of rank 0 alone. Raises ValueError if the job has more or fewer tasks than the stage ranks.
    """
    from zexp.study.stages import Ended, run_stage
    from zexp.train import ranks
    from zexp.train.lifeline import lead
    from zexp.train.parallel import World

    world = World.from_environment(environ)
    if world.size != count(request):
        raise ValueError(
            f"stage {request['stage']} is for {count(request)} ranks, and this job has {world.size} "
            "(WORLD_SIZE, or SLURM_NTASKS). Start one task for each rank."
        )
    if world.rank > 0:
        return Ended(cast("Result", ranks.follow(root, request, world)))
    with lead(world, request["ranks"]["timeout_seconds"]) as leading:
        ended = run_stage(root, request, handlers=handlers, watcher=watcher, **({} if times is None else {"times": times}))
        leading.over(ended.result)
    return ended
