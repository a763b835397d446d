"""What sharing saves: twelve anneals over one pretraining, as one study and each trained on its own.

    python benchmarks/shared_prefix.py [--anneal-tokens 49152] [--slots 1 2] [--output FILE]

The same twelve configs (transformer_tiny, twelve peaks of the anneal) are trained by the same trainer on the same slots: once
as a study, and once in a store each, so that nothing can be shared, as many commands at a time as there are slots. The
pretraining is nine times as long as an anneal; the corpus is built before both. Work alone gives 12 · 10 / (9 + 12) = 5.7
on one slot and 4.0 on two, where a shared pretraining keeps one of them.

Writes JSON with the machine and the versions. The last result is benchmarks/results/shared_prefix.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARMS, RATIO, BATCH = 12, 9, 4096
PEAKS = [round(0.25 + 0.05 * n, 2) for n in range(ARMS)]


def words(anneal_tokens: int, slots: int) -> list[str]:
    return [
        "arch=transformer_tiny", "anneal=control", f"anneal.tokens={anneal_tokens}", f"anneal.warmup_tokens={2 * BATCH}",
        f"phases.pretrain.tokens={RATIO * anneal_tokens}", f"phases.pretrain.batch_tokens={BATCH}", "schedule=constant",
        f"schedule.warmup_tokens={4 * BATCH}", "eval=none", "checkpoint.keep.ladder=false", f"hydra.launcher.slots={slots}",
    ]  # fmt: skip


def zexp(folder: Path, store: Path, *overrides: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ZEXP_STORE": str(store)}
    command = [sys.executable, "-m", "zexp.cli", "run", *overrides]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)


def with_data(folder: Path, name: str) -> Path:
    """A store of its own in which the data stages are done."""
    store = folder / name
    for kind in ("tokenizer", "corpus", "packing"):
        shutil.copytree(folder / "data" / kind, store / kind)
    return store


def measure(folder: Path, anneal_tokens: int, slots: int) -> dict[str, float]:
    common = words(anneal_tokens, slots)
    shared = with_data(folder, f"shared-{slots}")
    began = time.monotonic()
    zexp(folder, shared, "-m", *common, f"anneal.peak_fraction={','.join(map(str, PEAKS))}")
    together = time.monotonic() - began
    alone = [with_data(folder, f"alone-{slots}-{n}") for n in range(ARMS)]
    began = time.monotonic()
    with ThreadPoolExecutor(slots) as pool:
        runs = [
            pool.submit(zexp, folder, store, *common[:-1], "hydra.launcher.slots=1", f"anneal.peak_fraction={peak}")
            for store, peak in zip(alone, PEAKS, strict=True)
        ]
        for run in runs:
            run.result()
    separately = time.monotonic() - began
    trained = {path.name for path in (shared / "trajectory").iterdir()}
    assert len(trained) == ARMS + 1, trained
    for store in alone:
        assert {path.name for path in (store / "trajectory").iterdir()} <= trained, "other configs than the study's"
    return {"study_seconds": together, "alone_seconds": separately, "ratio": separately / together}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--anneal-tokens", type=int, default=12 * BATCH)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        short = [word for word in words(BATCH, 1) if not word.startswith(("anneal", "phases.pretrain.tokens"))]
        zexp(folder, folder / "data", *short, "anneal=none", f"phases.pretrain.tokens={5 * BATCH}")
        results = {str(slots): measure(folder, options.anneal_tokens, slots) for slots in options.slots}
    report = {
        "anneal_tokens": options.anneal_tokens,
        "pretraining_tokens": RATIO * options.anneal_tokens,
        "arms": ARMS,
        "by_slots": results,
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        "versions": {name: metadata.version(name) for name in ("torch", "submitit", "hydra-core")},
        "date": datetime.now(UTC).date().isoformat(),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
