"""A whole training step on CPU, beside `transformers`: forward, backward, clipping and AdamW on the same weights and tokens.

    python benchmarks/step.py [--json] [--quick] [--models llama mamba2 …] [--threads 2] [--out benchmarks/results/step.json]

Each side is a process of its own, so that its peak memory is its own; they take turns step by step, so that other work on the
machine hits both. A ratio is of the medians of a side's steps; `first` is the time from a model that is built to its first
finished step, with everything that is compiled before it. --quick leaves out the peers under torch.compile. Of Mamba1, whose steps
take their peer minutes, it is one step of theirs at batch 1, their first. Peers are run as they come (fp32), under bf16 autocast, and under bf16 autocast with
torch.compile; zexp with precision fp32 and bf16 (autocast; weights, gradients and optimizer fp32 on both sides).

The share of the machine is of the best rate at which `torch.mm` multiplies bf16 matrices here; model FLOPs are zexp.calc's at
chunk 64, whatever chunk runs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

VOCAB, SEQ_LEN, BATCH = 8192, 512, 8
LR, BETAS, EPS, DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
_SSD = {"state_size": 64, "head_dim": 64, "num_heads": 8, "n_groups": 1, "chunk_size": 64}
_TIED = {"vocab_size": VOCAB, "hidden_size": 256, "num_hidden_layers": 12, "tie_word_embeddings": True, "use_cache": False}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _TIED | {"intermediate_size": 683, "num_attention_heads": 4}),
    "mamba2": ("mamba2", _TIED | _SSD),
    "zamba2": (
        "zamba2",
        _TIED
        | {
            "mamba_d_state": 64, "mamba_headdim": 64, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 64,
            "intermediate_size": 683, "num_attention_heads": 8, "adapter_rank": 16, "num_mem_blocks": 1,
            "hybrid_layer_ids": [5, 11], "layers_block_type": ["mamba"] * 5 + ["hybrid"] + ["mamba"] * 5 + ["hybrid"],
        },
    ),
    "mixtral": (
        "mixtral",
        _TIED | {"intermediate_size": 344, "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 8},
    ),
    "mamba": ("mamba", _TIED | {"state_size": 16}),
}  # fmt: skip
PEERS = {"fp32": (False, False), "bf16": (True, False), "bf16+compile": (True, True)}
# What is asked of zexp at its best: against the peer as it comes, against the peer at its best.
GOALS = {"llama": (2.0, 1.2), "mamba2": (3.0, 1.5), "zamba2": (3.0, 1.5), "mixtral": (2.0, None), "mamba": (50.0, None)}


# Both sides


def batches(batch: int, count: int) -> Iterator[Any]:
    """(batch, SEQ_LEN + 1) token ids of a text that can be learned: each token follows from the one before, with noise.

    None is 0: Zamba2 takes that for padding and begins with a row of zeros there, at which the gradient of a norm is 1/sqrt(eps).
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    follows = torch.randperm(VOCAB, generator=generator)
    for _ in range(count):
        tokens = torch.randint(1, VOCAB // 8, (batch, SEQ_LEN + 1), generator=generator)
        kept = torch.rand(tokens.shape, generator=generator) < 0.7
        for place in range(1, SEQ_LEN + 1):
            tokens[:, place] = torch.where(kept[:, place], follows[tokens[:, place - 1]] % (VOCAB // 8 - 1) + 1, tokens[:, place])
        yield tokens


def adamw(model: Any, decayed: Sequence[str]) -> Any:
    import torch

    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n in decayed], "weight_decay": DECAY},
        {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=LR, betas=BETAS, eps=EPS, fused=True)


def arithmetic(bf16: bool) -> AbstractContextManager[Any]:
    import torch

    return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()


def theirs(folder: Path, setting: str) -> Callable[[Any], float]:
    """A step of `transformers`' model: token ids -> the loss before it."""
    import torch
    import transformers

    bf16, compiled = PEERS[setting]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = adamw(model, [n for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n and "conv" not in n])
    run = torch.compile(model) if compiled else model

    def step(tokens: Any) -> float:
        with arithmetic(bf16):
            # They shift the labels themselves.
            loss = run(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def ours(folder: Path, setting: str) -> Callable[[Any], float]:
    """A step of zexp's, with the functions that its training loop calls."""
    import torch

    from zexp.model.build import decayed
    from zexp.train import optimizer
    from zexp.train.batches import Batch
    from zexp.train.machine import keep_freed_memory
    from zexp.train.step import backward

    keep_freed_memory()
    model = our_model(folder)
    optim = optimizer.build(model, {"kind": "adamw", "betas": BETAS, "eps": EPS, "weight_decay": DECAY}, decayed(model))

    def step(tokens: Any) -> float:
        inputs = tokens[:, :-1].contiguous()
        labels = inputs.roll(-1, 1)
        labels[:, -1] = -100  # as theirs, who shift the labels themselves
        loss = backward(
            model, Batch(inputs, labels, torch.zeros_like(inputs)), micro_batch=len(inputs), precision=setting,
            document_mask=False, labels=labels.numel() - len(labels),
        )  # fmt: skip
        optimizer.clip(model, CLIP)
        optimizer.step(optim, LR)
        return float(loss.detach())

    return step


def our_model(folder: Path) -> Any:
    """The model of a folder of `transformers`', with its weights."""
    from zexp.model.build import build
    from zexp.model.hf import convert
    from zexp.model.hf import folder as checkpoints

    family, semantic, found = described(folder)
    checkpoints.check(found, semantic, "folder")
    model = build(semantic, seed=None)
    convert.load(found, family, model, semantic)
    return model


def described(folder: Path) -> tuple[Any, dict[str, Any], Any]:
    from zexp.blocks.resolve import resolve_model
    from zexp.model.hf import folder as checkpoints
    from zexp.model.hf.table import family_for

    found = checkpoints.read(folder, "folder")
    family = family_for(found.config, found.where)
    arch = family.arch(found.config)
    for letter, keys in {"m": {"chunk": 64}, "e": {"aux_loss": 0.0}}.items():  # Mixtral adds no loss of its router as it comes
        if letter in arch["blocks"]:
            arch["blocks"][letter] |= keys
    return family, resolve_model(arch, arch["vocab_size"]), found


# One side's process


def serve(side: str, folder: Path, setting: str, threads: int) -> None:
    """Answers on stdout, one JSON line each: to `step <batch>` its seconds and the loss before it."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if side == "theirs":
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    step = (ours if side == "ours" else theirs)(folder, setting)
    data = {size: batches(size, 1000) for size in (1, BATCH)}
    base = peak_mb()
    print(json.dumps({"base_mb": base}), flush=True)
    for line in sys.stdin:
        tokens = next(data[int(line.split()[1])])
        began = time.perf_counter()
        loss = step(tokens)
        print(json.dumps({"seconds": time.perf_counter() - began, "loss": loss, "peak_mb": peak_mb()}), flush=True)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Served:
    """The process of one side, `script --serve`: it answers each line by one of JSON, and begins with one."""

    def __init__(self, script: str, side: str, folder: Path, setting: str, threads: int) -> None:
        self.side, self.setting = side, setting
        self.process = subprocess.Popen(
            [sys.executable, script, "--serve", side, str(folder), setting, "--threads", str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        self.began = self._answer()

    def asked(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.side} {self.setting} ended without an answer (exit status {self.process.wait()})")
        found: dict[str, Any] = json.loads(line)
        return found


class Side(Served):
    """The steps of one side, and what it has measured."""

    def __init__(self, side: str, folder: Path, setting: str, threads: int) -> None:
        super().__init__(__file__, side, folder, setting, threads)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak = 0.0
        self.base = self.began["base_mb"]

    def step(self, batch: int = BATCH) -> float:
        said = self.asked(f"step {batch}")
        self.seconds.append(said["seconds"])
        self.losses.append(said["loss"])
        self.peak = said["peak_mb"]
        return float(said["seconds"])

    def result(self, batch: int = BATCH) -> dict[str, Any]:
        """first_seconds: the first step; median and best: of the later ones, of the first if it is the only one."""
        later = self.seconds[1:] or self.seconds
        tokens = batch * SEQ_LEN
        return {
            "side": self.side,
            "setting": self.setting,
            "steps": len(later),
            "first_seconds": self.seconds[0],
            "median_seconds": statistics.median(later),
            "best_seconds": min(later),
            "tokens_per_second": tokens / statistics.median(later),
            "peak_mb": self.peak,
            "peak_above_base_mb": self.peak - self.base,
            "losses": self.losses,
        }


# The comparison


def make(kind: str, keys: dict[str, Any], folder: Path) -> None:
    """A folder with random weights of theirs."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **keys)).save_pretrained(folder)


def compare(name: str, folder: Path, *, quick: bool, rounds: int, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All settings of both sides, step by step in turns."""
    from zexp.calc.model import flops_per_token

    semantic = described(folder)[1]
    settings = ["fp32", "bf16"] if quick else list(PEERS)
    if name == "mamba":  # minutes a step: their first one, at batch 1, beside ours at batch 1
        settings = ["fp32"]
    mine = [Side("ours", folder, setting, threads) for setting in ("fp32", "bf16")]
    theirs = [Side("theirs", folder, setting, threads) for setting in settings]
    batch = 1 if name == "mamba" else BATCH
    for one in mine + theirs:
        say(f"{name}: {one.side} {one.setting}: first step {one.step(batch):.1f} s")
    order = mine + theirs
    for turn in range(rounds):
        for one in order if turn % 2 == 0 else reversed(order):
            if name != "mamba" or one.side == "ours":
                one.step(batch)
    results = [one.result(batch) for one in order]
    for one in order:
        one.close()
    flops = flops_per_token(semantic, SEQ_LEN)["train"]
    return {"model": name, "batch": batch, "flops_per_token": flops, "results": results, **ratios(name, results, flops)}


def ratios(name: str, results: list[dict[str, Any]], flops: float) -> dict[str, Any]:
    ours = {one["setting"]: one for one in results if one["side"] == "ours"}
    theirs = {one["setting"]: one for one in results if one["side"] == "theirs"}
    best_ours = max(ours.values(), key=lambda one: float(one["tokens_per_second"]))
    best_theirs = max(theirs.values(), key=lambda one: float(one["tokens_per_second"]))
    pairs = list(zip(ours["fp32"]["losses"], theirs["fp32"]["losses"], strict=False))
    return {
        "over_as_it_comes": best_ours["tokens_per_second"] / theirs["fp32"]["tokens_per_second"],
        "over_its_best": best_ours["tokens_per_second"] / best_theirs["tokens_per_second"],
        "same_precision": {
            setting: one["tokens_per_second"] / theirs[setting]["tokens_per_second"]
            for setting, one in ours.items()
            if setting in theirs
        },
        "our_best": best_ours["setting"],
        "their_best": best_theirs["setting"],
        "memory": best_ours["peak_mb"] / theirs["fp32"]["peak_mb"],
        "memory_above_base": best_ours["peak_above_base_mb"] / theirs["fp32"]["peak_above_base_mb"],
        "first_seconds": best_ours["first_seconds"],
        "flops_per_second": best_ours["tokens_per_second"] * flops,
        "largest_loss_difference_fp32": max(abs(a - b) for a, b in pairs),
        "goal": GOALS[name],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout (progress goes to stderr)")
    parser.add_argument("--quick", action="store_true", help="without the compiled peers")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each side after its first")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    parser.add_argument("--serve", nargs=3, metavar=("SIDE", "FOLDER", "SETTING"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads < 1 or options.rounds < 1:
        parser.error("at least 1 thread and 1 round")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.absolute().parent}")
    if options.serve:
        serve(options.serve[0], Path(options.serve[1]), options.serve[2], options.threads)
        return
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:5.0f} s] {text}", file=sys.stderr, flush=True)

    import torch
    import transformers

    from zexp.bench import machine

    torch.set_num_threads(options.threads)
    rates = {name: machine.matmul_flops_per_second("cpu", dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    facts: dict[str, Any] = {
        "machine": machine.facts("cpu"),
        "transformers": transformers.__version__,
        "matmul_flops_per_second": rates,
        "models": [],
    }
    ceiling = facts["matmul_flops_per_second"]["bf16"]
    say(f"torch.mm: {facts['matmul_flops_per_second']['fp32'] / 1e9:.0f} GFLOP/s fp32, {ceiling / 1e9:.0f} bf16")
    with tempfile.TemporaryDirectory() as parent:
        for name in options.models:
            folder = Path(parent, name)
            make(*MODELS[name], folder)
            one = compare(name, folder, quick=options.quick, rounds=options.rounds, threads=options.threads, say=say)
            one["share_of_bf16_matmul"] = one["flops_per_second"] / ceiling
            facts["models"].append(one)
            say(
                f"{name}: {one['over_as_it_comes']:.2f} times the peer as it comes, {one['over_its_best']:.2f} times its best "
                f"({one['their_best']}); memory {one['memory']:.2f}, above base {one['memory_above_base']:.2f}; first step "
                f"{one['first_seconds']:.1f} s; {one['share_of_bf16_matmul']:.0%} of bf16 torch.mm; losses differ by "
                f"{one['largest_loss_difference_fp32']:.1e}"
            )
    facts["seconds"] = time.perf_counter() - began
    text = json.dumps(facts, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    if options.json:
        print(text)


if __name__ == "__main__":
    main()
