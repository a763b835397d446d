"""A block as it stands in a model, run forward and backward until its times are known. B batch · T positions · D model width."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zexp.bench import machine
from zexp.bench.blocks import LeftOut, Point
from zexp.bench.progress import progress
from zexp.bench.setting import device_of, setting
from zexp.bench.timing import Timing, in_order
from zexp.blocks.base import FeederSpec
from zexp.blocks.context import Context
from zexp.blocks.resolve import resolve_model
from zexp.config.errors import ConfigError
from zexp.model.build import build
from zexp.study.launch.machine import memory
from zexp.train.step import arithmetic

VOCABULARY = 8  # of the model that the block is taken from: its embedding is not used
CEILING_SECONDS = 0.6  # of each kind of matrix product


def measure(
    points: Sequence[Point], left_out: Sequence[LeftOut], said_device: str | None, threads: int | None, seconds: float
) -> dict[str, Any]:
    """What `zexp bench blocks --json` prints. seconds: for all points together, each has an equal share of what is left."""
    device = device_of(said_device)
    rows: list[dict[str, Any]] = []
    skipped = list(left_out)
    with setting(threads), progress("blocks", len(points) + 1) as say:
        say("the machine's ceilings")
        ceilings = {
            name: machine.matmul_flops_per_second(device, dtype, seconds=CEILING_SECONDS) for name, dtype in _MATMULS.items()
        }
        ceilings["memory"] = machine.memory_bytes_per_second(device)
        end = time.monotonic() + seconds
        for number, point in enumerate(points):
            say(str(point))
            if rows and time.monotonic() > end:
                skipped.append(LeftOut(point.to_json(), f"the {seconds:g} s of --seconds were over."))
                continue
            share = max(0.0, end - time.monotonic()) / (len(points) - number)
            try:
                rows.append(_row(point, device, share, ceilings))
            except _TooLarge as error:
                skipped.append(LeftOut(point.to_json(), f"{point}: {error}"))
            except ConfigError as error:  # kernels that cannot be had here
                skipped.append(LeftOut(point.to_json(), str(error)))
        about = machine.facts(device)
    if not rows:
        raise ConfigError([one.reason for one in skipped])
    peaks = [row["peak_bytes"] for row in rows if row["peak_bytes"] is not None]
    missing = [] if device == "cuda" else ["memory of one block: on a CPU it cannot be told from the rest of the process."]
    return {
        "machine": about, "ceilings": ceilings, "seconds": seconds, "rows": rows, "left_out": [one.to_json() for one in skipped],
        "largest_peak_bytes": max(peaks, default=None), "not_measured": missing,
    }  # fmt: skip


class _TooLarge(Exception):
    """The device has not the memory for a point."""


_MATMULS = {"matmul_fp32": torch.float32, "matmul_bf16": torch.bfloat16}


def _row(point: Point, device: str, seconds: float, ceilings: dict[str, float]) -> dict[str, Any]:
    _check_room(point, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        passes = Passes(point, device)
        times = in_order({"forward": passes.forward, "backward": passes.backward}, device, seconds=seconds, least=3)
    except torch.OutOfMemoryError as error:
        raise _TooLarge(str(error).partition("\n")[0]) from error
    matmul = ceilings[f"matmul_{point.dtype}"]
    moved = point.moved_bytes
    both = Timing(tuple(a + b for a, b in zip(times["forward"].seconds, times["backward"].seconds, strict=True)))
    found = {
        **point.to_json(),
        "forward": _figures(times["forward"], point.flops, moved["forward"], matmul, ceilings["memory"]),
        "backward": _figures(times["backward"], 2 * point.flops, moved["backward"], matmul, ceilings["memory"]),
        "both": _figures(both, 3 * point.flops, sum(moved.values()), matmul, ceilings["memory"]),
        "tokens_per_second": point.tokens / both.median,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }
    return found | {"intensity": found["both"]["intensity"]}


def _figures(times: Timing, flops: float, moved: float, matmul: float, bandwidth: float) -> dict[str, Any]:
    """intensity: FLOPs a byte; attainable: what the roofline allows there. Rates are of the median."""
    rate, attainable = flops / times.median, min(matmul, flops / moved * bandwidth)
    return {
        **times.to_json(), "flops": flops, "bytes": moved, "intensity": flops / moved, "flops_per_second": rate,
        "share_of_matmul": rate / matmul, "attainable_flops_per_second": attainable, "share_of_attainable": rate / attainable,
    }  # fmt: skip


def _check_room(point: Point, device: str) -> None:
    """Raises _TooLarge where what is kept between the passes alone exceeds the free memory."""
    ram = None if device == "cuda" else memory()
    free: int | None = torch.cuda.mem_get_info()[0] if device == "cuda" else None if ram is None else ram.available
    needed = point.kept_bytes + 8 * point.parameters
    if free is not None and needed > free:
        raise _TooLarge(
            f"it takes about {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free. Take a smaller batch or sequence."
        )


class Passes:
    """The two passes of one block, each to be called after the other."""

    def __init__(self, point: Point, device: str):
        self.point, self.device = point, device
        is_feeder = isinstance(point.spec, FeederSpec)
        # The first layer of a letter may lack weights (RWKV-7): then the second one is measured.
        second = point.spec.missing_in_first(point.width) > 0
        layers = [f"{point.letter}c"] if is_feeder else [point.letter] * (2 if second else 1)
        arch = {"pattern": layers, "width": point.width, "blocks": {point.letter: point.keys}}
        model = build(resolve_model(arch, VOCABULARY), seed=0, kernels=point.kernels, device=device).train()
        layer: Any = model.layers[-1]
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(point.batch, point.seq_len, point.width, generator=generator).to(device)
        self.notes: dict[str, Tensor] = {}
        self.inputs: tuple[Tensor, ...]
        with torch.no_grad(), arithmetic(point.dtype, device):
            if is_feeder:
                self.inputs = (hidden.requires_grad_(), torch.randn_like(hidden).requires_grad_())
            else:
                self.inputs = (layer.norm(hidden).detach().requires_grad_(),)
            if second:
                first: Any = model.layers[0]
                context = Context()
                first.branches[point.letter](first.norm(hidden), context)
                self.notes = {name: note.detach().requires_grad_() for name, note in context.notes.items()}
        shared: Any = model.shared[point.letter][0] if is_feeder else None  # type: ignore[index]
        self.block: Callable[[Context], Tensor]
        if is_feeder:
            self.block = lambda context: shared(*self.inputs, layer.call, context)
        else:
            self.block = lambda context: layer.branches[point.letter](*self.inputs, context)
        self.weights = [
            *(shared if is_feeder else layer.branches[point.letter]).parameters(),
            *(layer.call.parameters() if is_feeder else ()),
        ]
        self.out: Tensor | None = None
        self.auxiliary: list[Tensor] = []
        self.gradient: Tensor | None = None

    def forward(self) -> None:
        """The pass as training makes it, with what the backward pass needs kept."""
        for tensor in (*self.weights, *self.inputs, *self.notes.values()):
            tensor.grad = None
        self.auxiliary = []
        with arithmetic(self.point.dtype, self.device):
            self.out = self.block(Context(None, self.auxiliary, dict(self.notes)))

    def backward(self) -> None:
        """The gradients of weights and inputs."""
        assert self.out is not None
        if self.gradient is None:
            self.gradient = torch.ones_like(self.out)
        torch.autograd.backward(
            [self.out, *self.auxiliary], [self.gradient, *(torch.ones_like(loss) for loss in self.auxiliary)]
        )
        self.out = None
