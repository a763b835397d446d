"""How long `zexp plan` takes for studies of 100 and 1,000 variants, as a whole process on an empty store.

    python benchmarks/plan_size.py

Each study is a grid of group choices and values × two arms × seeds; wall time is what a user waits for, CPU time is what
it costs when the machine has other work. Target: below 5 s and 30 s on two cores.
Last result (two cores of a cloud machine, one of them busy; before compositions were shared: 19.4 s of CPU time for 100):
      100 variants,   785 stages:   2.0 s of wall time,   2.0 s of CPU time
     1000 variants,  6360 stages:   4.9 s of wall time,   4.9 s of CPU time
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STUDY = """# @package _global_
study:
  name: size
  grid:
    arch: [transformer_tiny, mamba2_tiny, zamba2_tiny, moe_tiny, swa_tiny]
    anneal.peak_fraction: {fractions}
  arms: {{control: [anneal=control], replay60: [anneal=replay60]}}
  seeds: {seeds}
hydra: {{mode: MULTIRUN}}
"""
SIZES = {100: ([0.25, 0.75], list(range(5))), 1000: ([k / 10 for k in range(1, 11)], list(range(10)))}


def measure(variants: int) -> tuple[float, float, int]:
    """(wall seconds, CPU seconds, stages) of one plan."""
    fractions, seeds = SIZES[variants]
    with tempfile.TemporaryDirectory() as folder:
        sweeps = Path(folder, "conf", "sweeps")
        sweeps.mkdir(parents=True)
        (sweeps / "size.yaml").write_text(STUDY.format(fractions=fractions, seeds=seeds))
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, "-m", "zexp.cli", "plan", "--json", "+sweeps=size"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ZEXP_STORE": str(Path(folder, "store"))}
        done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, check=True)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    plan = json.loads(done.stdout)
    assert plan["variants"] == variants
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, len(plan["stages"])


if __name__ == "__main__":
    for variants in SIZES:
        seconds, cpu, stages = min(measure(variants) for _ in range(3))
        print(f"{variants:5d} variants, {stages:5d} stages: {seconds:5.1f} s of wall time, {cpu:5.1f} s of CPU time")
