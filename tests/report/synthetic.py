"""A store with fabricated results: a small study as zexp run leaves it, written through the store's own functions.

No number in it was measured. Two or three architectures, a trunk and a decay each, then two arms that fork.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from zexp.store import files
from zexp.store.folder import StageFolder, Store
from zexp.store.ids import round12, semantic_id, short

STEP = 4096
TRUNK, DECAY, ANNEAL = 128 * STEP, 141 * STEP, 165 * STEP
TASKS = ("bpb_base", "bpb_high_quality", "cloze")
FINGERPRINT = {"device": "a test", "threads": 1, "backends": {"linear": "torch"}, "packages": {}}


class Invented(RuntimeError):
    """What a failed stage fails with."""


@dataclass
class Study:
    """Knobs. outcome: what becomes of a stage: done, failed, diverged, interrupted or missing.

    vary_pretraining: False = all seeds fork from one pretraining. seed_read: False = no seed makes a difference.
    items: of each task. gain: the replay arm's, in bits per byte. threads: variant -> threads of its fingerprint.
    """

    root: Path
    archs: tuple[str, ...] = ("transformer_tiny", "mamba2_tiny", "zamba2_tiny")
    arms: tuple[str, ...] = ("control", "replay60")
    seeds: tuple[int, ...] = (0,)
    vary_pretraining: bool = True
    items: int = 60
    gain: float = 0.08
    seed_read: bool = True
    threads: dict[str, int] = field(default_factory=dict)
    outcome: Callable[[dict[str, Any]], str] = lambda stage: "done"
    baseline: dict[str, Any] = field(default_factory=lambda: {"arm": "control"})


def make(study: Study, name: str = "invented") -> Store:
    """Write the store and the study's variants.json."""
    with patch("os.fsync"):  # hundreds of them cost the suite half a minute, a power cut would cost fabricated data
        return _Maker(study, name).make()


class _Maker:
    def __init__(self, study: Study, name: str) -> None:
        self.study, self.name = study, name
        self.store = Store(study.root)
        self.stages: dict[str, dict[str, Any]] = {}

    def make(self) -> Store:
        study = self.study
        tokenizer = self.stage("tokenizer", {"numerics": {"tokenizer.bpe": 1}}, [], label="tokenizer")
        packing = self.stage("packing", {"corpus": tokenizer["full"]}, [tokenizer["id"]], label="packing base")
        variants, pretrained = [], {}
        for arch in study.archs:
            for arm in study.arms:
                for seed in study.seeds:
                    row = f"{arch},{arm}"
                    variant = f"{row},seed={seed}" if len(study.seeds) > 1 else row
                    pretrain_seed = seed if study.vary_pretraining and study.seed_read else study.seeds[0]
                    anneal_seed = seed if study.seed_read else study.seeds[0]
                    at = f"{arch}@pretrain"
                    pre_name = f"{at},seed={pretrain_seed}" if len(study.seeds) > 1 else at
                    trunk = self.segment(arch, None, 0, TRUNK, "pretrain", {"init": pretrain_seed}, packing, variant)
                    decay = self.segment(arch, trunk, TRUNK, DECAY, "pretrain", {}, packing, variant)
                    end = self.segment(
                        arch, decay, DECAY, ANNEAL, "anneal", {"arm": arm, "seed": anneal_seed}, packing, variant
                    )
                    common = {
                        "arch": arch, "seed": seed, "pretrain_seed": pretrain_seed,
                        "parameters": {"total": 1_300_000, "active": 1_300_000, "embedding": 524_288},
                    }  # fmt: skip
                    pretrained[pre_name] = {
                        **common, "name": pre_name, "row": at, "axes": {"arch": arch}, "anneal": None,
                        "anneal_seed": None, "tokens": DECAY, "train_flops": 7.9e6 * DECAY,
                        "segments": [trunk["id"], decay["id"]],
                        "evals": self.evals(decay, arch, None, pretrain_seed, variant),
                    }  # fmt: skip
                    variants.append({
                        **common, "name": variant, "row": row, "axes": {"arch": arch, "arm": arm}, "anneal": arm,
                        "anneal_seed": anneal_seed, "tokens": ANNEAL, "train_flops": 7.9e6 * ANNEAL,
                        "segments": [trunk["id"], decay["id"], end["id"]],
                        "evals": self.evals(end, arch, arm, seed if study.seed_read else 0, variant),
                        "pretrained": pre_name,
                    })  # fmt: skip
        folder = self.store.study(self.name)
        folder.mkdir(parents=True, exist_ok=True)
        said = {
            "name": self.name, "question": "Does an invented arm beat an invented control?", "revision": 1,
            "metric": "bpb_high_quality/bits_per_byte", "baseline": study.baseline,
        }  # fmt: skip
        files.write_json(
            folder / "variants.json",
            {
                "study": said,
                "stages": [{k: v for k, v in s.items() if k != "full"} for s in self.stages.values()],
                "variants": variants,
                "pretrained": list(pretrained.values()),
            },
        )
        return self.store

    def stage(
        self, kind: str, semantic: dict[str, Any], parents: list[str], *, label: str,
        cut: tuple[int, int] | None = None, phase: str | None = None, variant: str | None = None,
        fill: Callable[[dict[str, Any], StageFolder], None] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Declare a stage once, and make what the study's outcome says of it."""
        full = semantic_id(semantic)
        store_kind = "trajectory" if kind == "segment" else kind
        id = short(full) if cut is None else f"{short(full)}@{cut[1]}"
        if id not in self.stages:
            stage = {
                "id": id, "kind": kind, "phase": phase, "label": label, "folder": f"{store_kind}/{short(full)}",
                "parents": parents, "variants": [], "from": cut and cut[0], "to": cut and cut[1],
                "tokens": cut[1] - cut[0] if cut else 0, "cached": False, "full": full,
            }  # fmt: skip
            self.stages[id] = stage
            blocked = any(self.stages[p].get("blocked") for p in parents)
            outcome = "missing" if blocked else self.study.outcome(stage)
            stage["blocked"] = blocked or outcome != "done"
            if not blocked and outcome != "missing":
                folder = self.store.folder(store_kind, full)
                folder.create(semantic, {"made_by": "a test"})
                self.leave(stage, folder, outcome, fill)
        if variant is not None:
            self.stages[id]["variants"].append(variant)
        return self.stages[id]

    def leave(
        self, stage: dict[str, Any], folder: StageFolder, outcome: str,
        fill: Callable[[dict[str, Any], StageFolder], None] | None,
    ) -> None:  # fmt: skip
        attempt = folder.attempt({"stage": stage["id"], "to": stage["to"]})
        assert attempt is not None
        try:
            with attempt:
                attempt.log.write_text(f"the log of {stage['label']}\n")
                if fill is not None:
                    fill({"attempt": attempt, "outcome": outcome}, folder)
                if outcome == "failed":
                    raise Invented("out of imaginary memory")
                if outcome == "diverged":
                    attempt.diverge((stage["from"] + stage["to"]) // 2, "the loss of a step is not finite")
                elif outcome == "done" and fill is None:
                    scratch = attempt.scratch("result")
                    (scratch / "info.json").write_text("{}")
                    attempt.publish(scratch, "result")
        except Invented:
            pass  # written to failure.json by the attempt

    def segment(
        self, arch: str, parent: dict[str, Any] | None, start: int, end: int, phase: str, seeds: dict[str, Any],
        packing: dict[str, Any], variant: str,
    ) -> dict[str, Any]:  # fmt: skip
        peak = 0.003
        if parent is None:
            warm = 10 * STEP
            pieces = [
                {"from": 0, "to": warm, "shape": "linear", "start": 0.0, "end": peak},
                {"from": warm, "to": None, "shape": "constant", "start": peak, "end": peak},
            ]
        elif phase == "pretrain":
            pieces = [{"from": start, "to": end, "shape": "one_minus_sqrt", "start": peak, "end": 0.0}]
        else:
            pieces = [
                {"from": start, "to": start + 3 * STEP, "shape": "linear", "start": 0.0, "end": round12(0.75 * peak)},
                {"from": start + 3 * STEP, "to": end, "shape": "linear", "start": round12(0.75 * peak), "end": 0.0},
            ]
        semantic = {
            "parent": None if parent is None else {"id": parent["full"], "tokens": start},
            "lr": pieces, "arch": arch, "seeds": seeds, "optimizer_state": "carry",
        }  # fmt: skip
        threads = self.study.threads.get(variant, 1)

        def fill(made: dict[str, Any], folder: StageFolder) -> None:
            attempt, last = made["attempt"], end
            noise = random.Random(f"{arch} {seeds} {phase}")
            if made["outcome"] != "done":
                last = (start + end) // 2
            for tokens in range(start + STEP, last + 1, STEP):
                drop = 0.15 if seeds.get("arm") == "replay60" and tokens > start else 0.0
                loss = 2.1 + 6.2 * math.exp(-tokens / (40 * STEP)) - drop * (tokens - start) / (end - start)
                attempt.metric(step=tokens // STEP, tokens=tokens, loss=loss + noise.gauss(0, 0.05), lr=peak)
            attempt.progress(last, end, "tokens")
            if made["outcome"] == "done":
                scratch = attempt.scratch("state")
                name = f"{threads:016x}"
                files.write_json(
                    scratch / "state.json",
                    {
                        "tokens": end,
                        "fingerprints": [{"from": start, "to": end, "fingerprint": name}],
                        "fingerprint_details": {name: {**FINGERPRINT, "threads": threads}},
                    },
                )
                attempt.publish(scratch, f"states/{end}")

        parents = [packing["id"]] if parent is None else [parent["id"], packing["id"]]
        label = f"{arch} {phase}" + (f" {seeds['arm']}" if "arm" in seeds else "")
        return self.stage(
            "segment", semantic, parents, label=label, cut=(start, end), phase=phase, variant=variant, fill=fill
        )

    def evals(self, state: dict[str, Any], arch: str, arm: str | None, seed: int, variant: str) -> dict[str, str]:
        return {task: self.eval(task, state, arch, arm, seed, variant)["id"] for task in TASKS}

    def eval(
        self, task: str, state: dict[str, Any], arch: str, arm: str | None, seed: int, variant: str
    ) -> dict[str, Any]:
        def fill(made: dict[str, Any], folder: StageFolder) -> None:
            if made["outcome"] != "done":
                return
            scratch = made["attempt"].scratch("result")
            metrics, samples = scores(task, arch, arm, seed, self.study)
            files.write_json(scratch / "results.json", {"task": task, "metrics": metrics})
            text = "".join(f"{line}\n" for line in samples)
            (scratch / "samples.jsonl").write_text(text)
            made["attempt"].publish(scratch, "result")

        semantic = {"state": {"id": state["full"], "tokens": state["to"]}, "task": task}
        return self.stage(
            "eval", semantic, [state["id"]], label=f"eval {task}", phase=state["phase"], variant=variant, fill=fill
        )


def scores(task: str, arch: str, arm: str | None, seed: int, study: Study) -> tuple[dict[str, Any], list[str]]:
    """results.json's metrics and samples.jsonl's lines, from a generator seeded by the arguments."""
    items = random.Random(task)  # the same documents for everybody
    model = random.Random(f"{task} {arch} {arm} {seed}")
    better = (0.3 if arm is not None else 0.0) + (study.gain if arm == "replay60" else 0.0)
    lines = []
    if task == "cloze":
        hits = []
        for i in range(study.items):
            hit = int(items.random() + model.gauss(0, 0.1) < 0.2 + better / 4)
            hits.append(hit)
            lines.append(json.dumps({"item": f"doc{i}", "acc": hit}))
        mean = sum(hits) / len(hits)
        stderr = math.sqrt(mean * (1 - mean) / (len(hits) - 1))
        metric = {"value": mean, "stderr": stderr, "n": len(hits), "higher_is_better": True, "chance": 0.02,
                  "baseline": {"name": "most frequent word", "value": 0.11}}  # fmt: skip
        return {"acc": metric}, lines
    bits, sizes = [], []
    for i in range(study.items):
        size = items.randint(200, 900)
        rate = 2.6 + items.gauss(0, 0.3) - better + model.gauss(0, 0.05)
        sizes.append(size)
        bits.append(size * rate)
        lines.append(json.dumps({"item": f"doc{i}", "bits_per_byte": [bits[-1], size]}))
    value, n = sum(bits) / sum(sizes), len(sizes)
    squares = sum((b - value * s) ** 2 for b, s in zip(bits, sizes, strict=True))
    stderr = math.sqrt(squares * n / (n - 1)) / sum(sizes)
    metric = {"value": value, "stderr": stderr, "n": n, "higher_is_better": False,
              "baseline": {"name": "unigram", "value": 4.61}}  # fmt: skip
    return {"bits_per_byte": metric}, lines
