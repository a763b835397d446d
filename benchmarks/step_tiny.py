"""Training tokens per second of the tiny architectures on one CPU thread: forward, backward, clip and AdamW.

    python benchmarks/step_tiny.py [--micro-batch 8 16] [--steps 5] [--threads 1] [--arch zamba2_tiny] [--packed] [--profile]

A step is 16 sequences of 256 tokens, cut into micro-batches. The best of the steps is printed beside the median: on a
machine with other work the best says what the code can do. The share is of what `torch.mm` reaches here, counting the
FLOPs of zexp.calc.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from zexp.blocks.resolve import resolve_model
from zexp.calc.model import flops_per_token
from zexp.model.build import build, decayed

ARCHS = ("transformer_tiny", "mamba2_tiny", "zamba2_tiny")
VOCAB, SEQ_LEN, SEQUENCES = 4096, 256, 16
CONF = Path(__file__).resolve().parent.parent / "conf" / "arch"


def matmul_flops_per_second() -> float:
    """The best rate of a product of the sizes that these models have."""
    left, right = torch.randn(2048, 128), torch.randn(128, 512)
    best = min(_timed(lambda: torch.mm(left, right)) for _ in range(50))
    return 2 * 2048 * 128 * 512 / best


def _timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def trainer(arch: str, micro_batch: int, packed: bool) -> tuple[dict[str, Any], Any]:
    """The resolved model, and a function that does one optimizer step."""
    arch_table: Any = OmegaConf.to_object(OmegaConf.load(CONF / f"{arch}.yaml"))
    semantic = resolve_model(arch_table, VOCAB)
    net = build(semantic, seed=0)
    names = set(decayed(net))
    groups = [
        {"params": [p for n, p in net.named_parameters() if n in names], "weight_decay": 0.1},
        {"params": [p for n, p in net.named_parameters() if n not in names], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (SEQUENCES, SEQ_LEN + 1), generator=generator)
    ids = torch.arange(SEQ_LEN).div(100, rounding_mode="floor").expand(micro_batch, -1) if packed else None

    def step() -> None:
        for part in tokens.split(micro_batch):
            loss = net.loss_sum(net(part[:, :-1], ids), part[:, 1:]) / (SEQUENCES * SEQ_LEN)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return semantic, step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", nargs="*", default=ARCHS)
    parser.add_argument("--micro-batch", nargs="*", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--packed", action="store_true", help="documents of 100 tokens instead of whole rows")
    parser.add_argument("--profile", action="store_true", help="print where one step spends its time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peak = matmul_flops_per_second()
    print(f"torch.mm: {peak / 1e9:.0f} GFLOP/s on {options.threads} thread(s)")
    for arch in options.arch:
        for micro_batch in options.micro_batch:
            semantic, step = trainer(arch, micro_batch, options.packed)
            step()
            seconds = [_timed(step) for _ in range(options.steps)]
            tokens = SEQUENCES * SEQ_LEN
            share = flops_per_token(semantic, SEQ_LEN)["train"] * tokens / min(seconds) / peak
            print(
                f"{arch:17} micro_batch {micro_batch:2}: {tokens / min(seconds):6.0f} tokens/s best, "
                f"{tokens / statistics.median(seconds):6.0f} median ({share:.0%} of torch.mm)",
                flush=True,
            )
            if options.profile:
                with torch.profiler.profile(with_stack=False) as profile:
                    step()
                print(
                    profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=22, max_name_column_width=40)
                )


if __name__ == "__main__":
    main()
