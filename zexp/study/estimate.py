"""How long the stages of a plan will take: measured where the store has a stage of that shape, else calculated.

The stated figures of the calculation, each with where it comes from, stand below; docs/study.md says how they were measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zexp.calc import devices
from zexp.study.measured import Measured
from zexp.study.plan import Plan, Stage
from zexp.study.queue import Queue
from zexp.study.resolve import Variant, layout_of

# Share of a GPU's peak that training reaches: published are 33 to 39 % for Llama-3-8B under torchtitan on 8 H100s in bf16.
MFU = 0.35
# FLOP/s of training in fp32 on one core of a server with AVX-512: between models of ten million parameters one at a time (30
# to 68 GFLOP/s) and models of 1.3 million on all cores at once (13 to 23); nothing measured is off by more than a factor of 2.3.
CORE_FLOPS = 3e10
# To load a state before a segment and to write one after it, models of 1 M to 10 M parameters.
SEGMENT_SECONDS = 1.0
# Importing lm-eval, once for all evaluations of a state; of a document that nothing else is known of.
EVAL_START_SECONDS = 4.0
EVAL_TOKENS = 128
EVAL_DOCUMENTS = 1000
# Work on data on one core: bytes a second of a tokenizer and a corpus, tokens a second of a packing, seconds of tasks.
TOKENIZER_BYTES = 6e5
CORPUS_BYTES = 1.2e6
PACKING_TOKENS = 1.5e7
TASKS_SECONDS = 0.5


@dataclass(frozen=True)
class Estimate:
    """seconds: on one slot, None = not known. source: measured, calculated, or unknown with no seconds. basis: which figure."""

    seconds: float | None
    source: str
    basis: str

    def to_json(self) -> dict[str, Any]:
        return {"seconds": None if self.seconds is None else round(self.seconds, 3), "source": self.source, "basis": self.basis}


def estimates(plan: Plan, measured: Measured, queue: Queue) -> dict[str, Estimate]:
    """Of every stage to do, in the plan's order."""
    variants = {variant.name: variant for variant in plan.variants}
    evals: dict[str, int] = {}
    for stage in plan.to_do:
        if stage.kind == "eval":
            evals[stage.parents[0]] = evals.get(stage.parents[0], 0) + 1
    found = {}
    for stage in plan.to_do:
        variant = variants[stage.variants[0]]
        if stage.kind == "segment":
            found[stage.id] = _segment(stage, variant, measured, queue)
        elif stage.kind == "eval":
            found[stage.id] = _eval(stage, variant, measured, queue, evals[stage.parents[0]])
        else:
            found[stage.id] = _data(stage, variant, measured)
    return found


def cost(stage: Stage, estimate: Estimate) -> float:
    """Seconds to order stages by; of a device that is not known, as if it were an A100."""
    if estimate.seconds is not None:
        return estimate.seconds
    flops = (stage.to_train or EVAL_DOCUMENTS * EVAL_TOKENS) * stage.flops_per_token
    return flops / (MFU * devices.DEVICES["a100"].flops["bf16"])


def _segment(stage: Stage, variant: Variant, measured: Measured, queue: Queue) -> Estimate:
    figure = measured.tokens_per_second(variant.chain.segments[0].semantic, stage.request)
    if figure is not None:
        seconds = stage.to_train / figure.value + SEGMENT_SECONDS
        of = f"{figure.count} attempt{'s' * (figure.count != 1)} of this shape"
        return Estimate(seconds, "measured", f"{figure.value:,.0f} tokens/s, {of} ({figure.folder})")
    speed, basis = flops_per_second(queue, variant)
    if speed is None:
        return Estimate(None, "unknown", basis)
    return Estimate(stage.to_train * stage.flops_per_token / speed + SEGMENT_SECONDS, "calculated", basis)


def flops_per_second(queue: Queue, variant: Variant) -> tuple[float | None, str]:
    """(what a training is reckoned to reach, in words where that is from); (None, why not) if nothing is known."""
    if queue.device == "cpu":
        threads = variant.run.parallelism.threads
        return CORE_FLOPS * threads, f"{CORE_FLOPS / 1e9:.0f} GFLOP/s a core"
    key, precision = queue.key, variant.run.precision
    if key is None:
        return None, f"the peak FLOP/s of {queue.model or 'the GPUs'} are not known; execution.device_model=h100 names a device"
    peak = devices.DEVICES[key].flops[precision] * layout_of(variant.run).devices
    return MFU * peak, f"{MFU:.0%} MFU of {key} in {precision}"


def _eval(stage: Stage, variant: Variant, measured: Measured, queue: Queue, of_state: int) -> Estimate:
    model = variant.chain.segments[0].semantic["model"]
    figure = measured.eval_seconds(stage.semantic, model, variant.run.parallelism.threads)
    if figure is not None:
        of = f"{figure.count} result{'s' * (figure.count != 1)} of this task and model"
        return Estimate(figure.value, "measured", f"{figure.value:.3g} s, {of} ({figure.folder})")
    speed, basis = flops_per_second(queue, variant)
    if speed is None:
        return Estimate(None, "unknown", basis)
    documents = _documents(stage.semantic)
    seconds = documents * EVAL_TOKENS * stage.flops_per_token / speed + EVAL_START_SECONDS / of_state
    return Estimate(seconds, "calculated", f"{documents:,} documents of {EVAL_TOKENS} tokens at {basis}")


def _documents(semantic: Mapping[str, Any]) -> int:
    """How many documents a task has: as its own YAML says, or a stated number; at most eval.limit."""
    zexp = ((semantic["task"]["yaml"] or {}).get("metadata") or {}).get("zexp") or {}
    builder = zexp.get("documents") or {}
    known = builder.get("items") or builder.get("pieces") or EVAL_DOCUMENTS
    limit = semantic["settings"].get("limit")
    return int(known if limit is None else min(known, limit))


def _data(stage: Stage, variant: Variant, measured: Measured) -> Estimate:
    seq_len = variant.run.seq_len
    work, speed = {
        "tokenizer": (stage.semantic.get("sample_bytes") or 0, TOKENIZER_BYTES),
        "corpus": (stage.tokens_bound, CORPUS_BYTES),
        "packing": (stage.tokens_bound / seq_len, PACKING_TOKENS / seq_len),
        "tasks": (1, 1 / TASKS_SECONDS),
    }[stage.kind]
    unit = {"packing": "sequences", "tasks": "stages"}.get(stage.kind, "bytes")
    figure = measured.units_per_second(stage.kind)
    if figure is not None:
        of = f"{figure.count} {stage.kind} stage{'s' * (figure.count != 1)}"
        return Estimate(work / figure.value, "measured", f"{figure.value:,.3g} {unit}/s, {of} ({figure.folder})")
    return Estimate(work / speed, "calculated", f"{speed:,.3g} {unit}/s")
