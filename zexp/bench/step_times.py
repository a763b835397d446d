"""Training steps of a config, timed. B sequences · T labels each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zexp.bench import machine, marks
from zexp.bench.marks import BACKWARD, BETWEEN, FORWARD, Marks, Spell, lapped
from zexp.bench.peak import Peak
from zexp.bench.progress import progress
from zexp.bench.setting import device_of, setting
from zexp.bench.step import Work
from zexp.bench.timing import in_turns, once
from zexp.calc import devices
from zexp.calc import model as calc
from zexp.model.build import build, decayed
from zexp.study import ranks
from zexp.train import optimizer
from zexp.train.batches import Batch
from zexp.train.fingerprint import fingerprint
from zexp.train.machine import recomputes
from zexp.train.step import backward

DOCUMENT_TOKENS = 256  # mean length of the documents that random tokens are cut into, where a config masks documents
LR = 1e-5  # AdamW costs the same at any rate; at this one the weights stay what they are
CLIP, UPDATE = "clipping", "optimizer"
MATMULS = {"fp32": "matmul_fp32", "bf16": "matmul_bf16"}


def measure(works: Sequence[Work], seconds: float) -> dict[str, Any]:
    """What `zexp bench step --json` prints. seconds: of all of them together."""
    found = []
    with progress("steps", 2 * len(works)) as say:
        for work in works:
            device = device_of(work.place["device"])
            with setting(work.place["threads"], deterministic=work.run.execution.deterministic):
                say(f"{work.name}: a step of {work.tokens:,} tokens")
                measured = _measured(work, device, seconds / len(works))
                say(f"{work.name}: the machine's ceilings")
                found.append(_answer(work, device, measured, machine.ceilings(device), machine.facts(device)))
    return {"steps": found}


def random_batch(work: Work, device: str) -> Batch:
    """Ids of the vocabulary, uniform; documents of DOCUMENT_TOKENS on average, geometric, where they are masked."""
    generator = torch.Generator().manual_seed(0)
    shape = (work.sequences, work.run.seq_len)
    tokens_BT = torch.randint(work.model["vocab_size"], (shape[0], shape[1] + 1), generator=generator)
    documents_BT = torch.zeros(shape, dtype=torch.int32)
    if work.segment["document_mask"]:
        begins = torch.rand(shape, generator=generator) < 1 / DOCUMENT_TOKENS
        documents_BT = begins.cumsum(dim=1).to(torch.int32)
    return Batch(tokens_BT[:, :-1].contiguous().to(device), tokens_BT[:, 1:].contiguous().to(device), documents_BT.to(device))


class Step:
    """The training loop's step, with marks where its parts begin."""

    def __init__(self, work: Work, device: str):
        self.work, self.device = work, device
        self.model = build(work.model, seed=0, kernels=work.run.kernels.backend, device=device).train()
        self.optimizer = optimizer.build(self.model, work.segment["optim"], decayed(self.model))
        self.batch = random_batch(work, device)
        self.marks = Marks(self.model, device)

    def __call__(self) -> float:
        """One step; the loss before it, in nats a token."""
        work = self.work
        loss = backward(
            self.model, self.batch, micro_batch=work.micro_batch, precision=work.run.precision,
            document_mask=work.segment["document_mask"],
        )  # fmt: skip
        self.marks.mark(Spell(CLIP, FORWARD))
        norm = optimizer.clip(self.model, work.segment["optim"]["clip"])
        found, _ = torch.stack([loss, norm]).tolist()  # as the loop, which looks for divergence before the update
        self.marks.mark(Spell(UPDATE, FORWARD))
        optimizer.step(self.optimizer, LR)
        self.model.after_step()
        self.marks.mark(Spell(BETWEEN, FORWARD))
        return float(found)

    def plain(self) -> None:
        """One step whose marks nobody reads."""
        self()
        self.marks.taken()


def _measured(work: Work, device: str, seconds: float) -> dict[str, Any]:
    _warm_up(device)
    peak = Peak(device)
    step = Step(work, device)
    began = time.monotonic()
    first = once(step.plain, device)
    laps: list[Mapping[Spell, float]] = []
    left = max(0.0, seconds - (time.monotonic() - began))
    times = in_turns({"plain": step.plain, "marked": lapped(step.marks, step, laps)}, device, seconds=left, least=3, most=200)
    return {
        "first": first,
        "times": times,
        "laps": laps[1:],
        "used": peak.bytes(),
        "how": peak.how,
    }  # the first lap does not count


def _warm_up(device: str) -> None:
    """What the first products of a process cost: code and buffers of the libraries."""
    left: Tensor = torch.ones(64, 64, device=device, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        (left.to(dtype) @ left.to(dtype)).sum().backward()


def _answer(
    work: Work, device: str, measured: Mapping[str, Any], ceilings: Mapping[str, float], about: Mapping[str, Any]
) -> dict[str, Any]:
    plain = measured["times"]["plain"]
    flops = calc.flops_per_token(work.model, work.run.seq_len)["train"]
    rate = work.tokens / plain.median
    ceiling = ceilings[MATMULS[work.run.precision]]
    key = devices.named(about["device"]) if device == "cuda" else None
    known = None if key is None else devices.DEVICES[key]
    peak = None if known is None else known.flops.get(work.run.precision)
    estimate = work.estimate()
    missing = []
    if device == "cpu":
        missing.append("memory of a GPU, and its MFU against a datasheet: this ran on the CPU.")
    if work.run.parallelism.data > 1:
        missing.append(
            f"the sum of gradients over {work.run.parallelism.data} ranks: this is one rank's share of the batch, alone."
        )
    asked = {
        "kernels": work.run.kernels.backend, "micro_batch": work.micro_batch, "threads": work.place["threads"],
        "ranks": ranks.request(work.run.parallelism), "deterministic": work.run.execution.deterministic,
        "activation_checkpointing": work.run.parallelism.activation_checkpointing,
    }  # fmt: skip
    if recomputes(work.model, {"seq_len": work.run.seq_len, "precision": work.run.precision}, asked, device):
        missing.append("activation checkpointing, which a training of this config has here: this step keeps what layers compute.")
    return {
        **work.about(),
        "backends": fingerprint(work.model, asked, device)["backends"],
        "machine": dict(about),
        "ceilings": dict(ceilings),
        "first_seconds": measured["first"],
        "step": plain.to_json(),
        "tokens_per_second": rate,
        "flops_per_second": rate * flops,
        "mfu": {
            "of_measured": rate * flops / ceiling, "ceiling": ceiling,
            "of_datasheet": None if peak is None else rate * flops / peak, "datasheet": peak,
            "source": None if known is None else known.source,
        },
        "memory": {
            "measured_bytes": measured["used"], "how": measured["how"], "estimate": estimate.to_json(),
            "measured_over_estimate": measured["used"] / estimate.total,
        },
        "breakdown": breakdown(work, measured),
        "documents": {"mean_tokens": DOCUMENT_TOKENS if work.segment["document_mask"] else None},
        "not_measured": missing,
    }  # fmt: skip


def breakdown(work: Work, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of each part, and the remainder of the whole: what is in no part."""
    spells = marks.mean(measured["laps"])
    names, counts = work.blocks(), marks.counts(work.model["pattern"])
    flops = calc_flops(work)
    marked = measured["times"]["marked"].seconds
    whole = sum(marked) / len(marked)
    rows = []
    for part in dict.fromkeys(spell.part for spell in spells):
        if part == BETWEEN:
            continue
        # The loss computes its gradient in the forward pass; clipping and update are in neither.
        whole_only = part in (marks.HEAD, CLIP, UPDATE)
        ways = {way: spells.get(Spell(part, way), 0.0) for way in (FORWARD, BACKWARD)}
        seconds = sum(ways.values())
        letters = part.split("|") if part in counts else []
        rows.append(
            {
                "part": " | ".join(f"{names[letter]} ({letter})" for letter in letters) or part,
                "letters": letters,
                "count": counts.get(part),
                "forward_seconds": None if whole_only else ways[FORWARD],
                "backward_seconds": None if whole_only else ways[BACKWARD],
                "seconds": seconds,
                "share": seconds / whole,
                "flops_per_second": flops.get(part, 0.0) / seconds or None,
            }
        )
    named = sum(row["seconds"] for row in rows)
    plain = measured["times"]["plain"]
    return {
        "rows": rows, "whole_seconds": whole, "remainder_seconds": whole - named, "laps": len(measured["laps"]),
        "marked_over_plain": measured["times"]["marked"].median / plain.median,
    }  # fmt: skip


def calc_flops(work: Work) -> dict[str, float]:
    """Training FLOPs of each part in a step."""
    model, tokens = work.model, work.tokens
    found: dict[str, float] = {}
    rows = {row.letter: row.flops / row.count for row in calc.block_table(model, work.run.seq_len) if row.letter is not None}
    for part, count in marks.counts(model["pattern"]).items():
        found[part] = calc.TRAIN_PER_FORWARD * tokens * count * sum(rows[letter] for letter in part.split("|"))
    head = next(row for row in calc.block_table(model, work.run.seq_len) if row.name == "head")
    found[marks.HEAD] = calc.TRAIN_PER_FORWARD * tokens * head.flops
    return found
