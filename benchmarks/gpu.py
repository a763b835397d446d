"""What zexp does on a GPU: parity, kernels, whole training steps and peers, in order of worth.

    python benchmarks/gpu.py --minutes 20 [--device cuda] [--out benchmarks/results/gpu.json] [--only parity kernels steps peers]

1. parity: every fused backend against the fp32 reference, values and gradients, on small and odd shapes (the self-check), with
   the errors that it found, and torch's own beside them.
2. kernels: the table of `zexp bench kernels` in bf16: times, shares of the device's ceiling, what is taken and why not.
3. steps: a whole step (forward, backward, clipping, AdamW; bf16 autocast, weights and optimizer fp32) of transformers, Mamba2
   and Zamba2 at 130M to 1.3B parameters, sequences of 4096: tokens/s, MFU by zexp.calc's exact model FLOPs (at chunk 64,
   whatever runs), the peak of memory against zexp.calc's estimate; the hybrids on the torch backends too; two models under
   deterministic algorithms.
4. peers: flash-linear-attention's and mamba-ssm's own models of the same size, in turns with zexp's in this process.

After each item the JSON is written, so that a run that is cut off leaves what it has. What does not fit into the time is listed
as skipped; what raises is listed with what it said, and the exit code is 1 then. Nothing is fetched. With --device cpu everything
runs to its end on tiny sizes, the result says so, and lists what a CPU cannot tell.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; for the deterministic step

import torch
from omegaconf import OmegaConf
from torch import Tensor

from zexp.bench import kernels, machine, setting
from zexp.bench.timing import Timing, in_turns, synchronize
from zexp.blocks.resolve import numerics, resolve_model
from zexp.calc import memory
from zexp.calc.devices import DEVICES, named
from zexp.calc.layout import Layout
from zexp.calc.model import flops_per_token, parameters
from zexp.config.places import conf_dir
from zexp.kernels import dispatch, select, selfcheck
from zexp.kernels.fused import adapter
from zexp.model.build import build, decayed
from zexp.train import optimizer
from zexp.train.batches import Batch
from zexp.train.step import backward

RESULTS = Path(__file__).parent / "results"
PARTS = ("parity", "kernels", "steps", "peers")
SEQ_LEN, VOCAB = {"cuda": 4096, "cpu": 128}, {"cuda": 50304, "cpu": 4096}
ADAMW = {"kind": "adamw", "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHARE = 0.7  # of the device's memory that the estimate of a step may fill; half of it where two models are timed in turns
WARM_STEPS = 3  # in which kernels are compiled and their configurations chosen


def _llama(layers: int, width: int, heads: int, mlp: int) -> dict[str, Any]:
    blocks = {"a": {"heads": heads, "rope_theta": 10000.0}, "d": {"width": mlp, "activation": "swiglu"}}
    return {"pattern": f"{layers}*(a d)", "width": width, "tie_embeddings": True, "blocks": blocks}


def _zamba2(layers: int, every: int, width: int, heads: int) -> dict[str, Any]:
    """As the 1.2B preset, smaller."""
    mamba = {"expand": 2, "state_size": 128, "head_dim": 64, "groups": 1, "conv_width": 4, "chunk": 256}
    shared = {
        "copies": 1, "heads": heads, "mlp_width": 4 * width, "activation": "gelu_erf", "concat_embeddings": True,
        "lora_rank": {"mlp": 64, "attention": 64}, "call_linear": True, "rope_theta": 10000.0,
    }  # fmt: skip
    calls = list(range(every - 1, layers, every))
    pattern = {"layers": layers, "fill": "m", "at": {"gm": calls}}
    return {"pattern": pattern, "width": width, "tie_embeddings": True, "blocks": {"m": mamba, "g": shared}}


# A preset of conf/arch, or an architecture. In order of worth: the small ones show most for their time.
MODELS: dict[str, dict[str, str | dict[str, Any]]] = {
    "cuda": {
        "transformer_130m": _llama(12, 768, 12, 2048),
        "mamba2_130m": "mamba2_130m",
        "zamba2_130m": _zamba2(18, 6, 768, 12),
        "mamba2_1p3b": "mamba2_1p3b",
        "zamba2_1p2b": "zamba2_1p2b",
        "transformer_1p3b": _llama(24, 2048, 16, 5504),
        "mamba2_370m": "mamba2_370m",
        "transformer_400m": _llama(24, 1024, 16, 2736),
    },
    "cpu": {name: name for name in ("transformer_tiny", "mamba2_tiny", "zamba2_tiny")},
}
HYBRIDS = ("mamba2", "zamba2")


class Report:
    """The JSON and the time that is left."""

    def __init__(self, path: Path, device: torch.device, minutes: float):
        self.path, self.end = path, time.monotonic() + 60 * minutes
        packages = {name: select.version(name) for name in (*select.packages(), "triton", "transformers")}
        self.found: dict[str, Any] = {
            "machine": machine.facts(device) | {"packages": packages},
            "minutes": minutes,
            "ran_to_its_end": False,
            "parts": {part: {} for part in PARTS},
            "skipped": [],
            "failed": [],
            "not_measured": [],
        }

    def left(self) -> float:
        return self.end - time.monotonic()

    def item(self, part: str, name: str, work: Callable[[], Any], *, seconds: float = 0.0) -> None:
        """Runs one piece if `seconds` are left for it; what it returns or raises is written down."""
        if self.left() < seconds:
            self.found["skipped"].append(f"{part} {name}: {self.left():.0f} s were left, it takes about {seconds:.0f}")
            self.write()
            return
        began = time.monotonic()
        try:
            result = work()
        except Exception as error:  # one piece that fails must not take the rest of a lent machine's time with it
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
            self.found["failed"].append(f"{part} {name}")
        self.found["parts"][part][name] = result
        print(f"{part} {name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        """Whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


# 1. Parity


def parity(report: Report, device: torch.device) -> None:
    for operation, row in sorted(select.BACKENDS.items()):
        for backend in row:
            report.item("parity", f"{operation} {backend.name}", partial(_parity, operation, backend, device), seconds=20)
        for function in dispatch.functions_of(operation):
            own = getattr(dispatch.TORCH, function)
            report.item("parity", f"{function} torch", partial(_errors, function, own, device))


def _parity(operation: str, backend: select.Backend, device: torch.device) -> dict[str, Any]:
    """Even with a known defect it is tried: whether the defect is there is worth knowing. Determinism is told, too."""
    on = dispatch.machine(device)
    if device.type != "cuda" or backend.missing():
        return {"not_run": select.reason_against(operation, backend, on, deterministic=False)}
    found: dict[str, Any] = {"against": select.reason_against(operation, backend, on, deterministic=True)}
    found["self_check"] = selfcheck.examine(operation, backend, device) or "passes"
    for name, fused in adapter(operation, backend.adapter()).items():
        found[name] = _errors(name, fused.run, device, fused.refuses)
    return found


def _errors(name: str, function: Callable[..., Tensor], device: torch.device, refuses: Any = None) -> dict[str, Any]:
    errors: dict[str, Any] = {}
    for label, dtype in kernels.DTYPES.items():
        try:
            error = selfcheck.measure(name, function, device, dtype, refuses=refuses)
        except Exception as problem:  # the other dtype may still run
            errors[label] = {"error": f"{type(problem).__name__}: {problem}"}
            continue
        errors[label] = None if error is None else {"value": error.value, "gradient": error.gradient}
    return errors


# 3. Steps


def architecture(name: str, arch: str | dict[str, Any], device: torch.device) -> dict[str, Any]:
    if isinstance(arch, str):
        arch = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(conf_dir() / "arch" / f"{arch}.yaml")))
    return resolve_model(arch, arch.get("vocab_size") or VOCAB[device.type])


def fitting(model: Mapping[str, Any], seq_len: int, device: torch.device, share: float = SHARE) -> int:
    """The largest micro-batch, a power of two up to 16, whose estimate fits."""
    if device.type == "cpu":
        return 2
    room = share * torch.cuda.get_device_properties(device).total_memory
    sizes = [size for size in (16, 8, 4, 2, 1) if estimate(model, seq_len, size).total <= room]
    if not sizes:
        one = estimate(model, seq_len, 1).total
        raise MemoryError(f"one sequence takes {one / 1e9:.0f} GB, {room / 1e9:.0f} GB are to be used")
    return sizes[0]


def estimate(model: Mapping[str, Any], seq_len: int, micro_batch: int) -> memory.Training:
    return memory.training(model, Layout(), seq_len=seq_len, micro_batch=micro_batch, precision="bf16")


def stepper(model: Mapping[str, Any], device: torch.device, micro_batch: int, seq_len: int, choice: str) -> Callable[[], float]:
    """A training step by the functions that zexp's loop calls."""
    built = build(model, seed=0, kernels=choice, device=device)
    optim = optimizer.build(built, ADAMW, decayed(built))
    batch = tokens(model["vocab_size"], micro_batch, seq_len, device)

    def step() -> float:
        loss = backward(built, batch, micro_batch=micro_batch, precision="bf16", document_mask=False)
        optimizer.clip(built, 1.0)
        optimizer.step(optim, 3e-4)
        return float(loss)

    return step


def tokens(vocab: int, batch: int, seq_len: int, device: torch.device) -> Batch:
    drawn = torch.randint(vocab, (batch, seq_len + 1), generator=torch.Generator().manual_seed(0)).to(device)
    inputs = drawn[:, :-1].contiguous()
    return Batch(inputs, drawn[:, 1:].contiguous(), torch.zeros_like(inputs))


def measured_step(
    model: Mapping[str, Any],
    device: torch.device,
    choice: str,
    rates: Mapping[str, float],
    *,
    deterministic: bool,
    seconds: float,
) -> dict[str, Any]:
    seq_len = SEQ_LEN[device.type]
    size = fitting(model, seq_len, device)
    with _fresh(device, deterministic):
        operations = select.operations_of(numerics(model))
        choices = dispatch.chosen(choice, operations, device, deterministic=deterministic)
        step = stepper(model, device, size, seq_len, choice)
        losses = [step() for _ in range(WARM_STEPS if device.type == "cuda" else 1)]
        timing = in_turns({"": step}, device, seconds=seconds, least=3)[""]
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        found = speed(model, timing, size, seq_len, rates)
    planned = estimate(model, seq_len, size).total
    return found | {
        "kernels": choice,
        "deterministic": deterministic,
        "backends": {operation: one.name for operation, one in choices.items()},
        "passed_over": {operation: one.passed_over for operation, one in choices.items() if one.passed_over},
        "losses": losses,
        "memory": {"estimated_bytes": planned, "peak_bytes": peak, "ratio": None if peak is None else peak / planned},
    }


def speed(model: Mapping[str, Any], timing: Timing, batch: int, seq_len: int, rates: Mapping[str, float]) -> dict[str, Any]:
    """Of the median. Shares are of the vendor's figure, where zexp.calc.devices has it, and of what was measured."""
    per_second = batch * seq_len / timing.median
    flops = flops_per_token(at_chunk_64(model), seq_len)["train"] * per_second
    return {
        "parameters": parameters(model)["total"],
        "micro_batch": batch,
        "seq_len": seq_len,
        "step": timing.to_json(),
        "tokens_per_second": per_second,
        "flops_per_second": flops,
        "mfu": {name: flops / rate for name, rate in rates.items()},
    }


def at_chunk_64(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model with the chunk that its FLOPs are counted at, whatever chunk runs: a longer one computes more of the same."""
    blocks = {letter: table | ({"chunk": 64} if "chunk" in table else {}) for letter, table in model["blocks"].items()}
    return {**model, "blocks": blocks}


def steps(report: Report, device: torch.device, rates: Mapping[str, float]) -> None:
    models = MODELS[device.type]
    seconds = 10.0 if device.type == "cuda" else 2.0
    rooms = 45.0 if device.type == "cuda" else 0.0

    def one(name: str, arch: Any, choice: str, deterministic: bool = False) -> Callable[[], Any]:
        return lambda: measured_step(
            architecture(name, arch, device), device, choice, rates, deterministic=deterministic, seconds=seconds
        )

    for number, (name, arch) in enumerate(models.items()):
        report.item("steps", name, one(name, arch, "auto"), seconds=rooms)
        if name.startswith(HYBRIDS) and number < 5:
            report.item("steps", f"{name} kernels=torch", one(name, arch, "torch"), seconds=rooms)
        if number < 2:
            report.item("steps", f"{name} deterministic", one(name, arch, "auto", True), seconds=rooms)
    _ratios(report)


def _ratios(report: Report) -> None:
    """Of the fused backends over torch's, where both ran."""
    found = report.found["parts"]["steps"]
    for name in [name for name in found if f"{name} kernels=torch" in found]:
        fused, own = found[name], found[f"{name} kernels=torch"]
        if "error" not in fused and "error" not in own:
            fused["times_torch"] = fused["tokens_per_second"] / own["tokens_per_second"]
    report.write()


# 4. Peers


def _fla_transformer(arch: Mapping[str, Any], vocab: int) -> Any:
    from fla.models import TransformerConfig, TransformerForCausalLM

    a, d = arch["blocks"]["a"], arch["blocks"]["d"]
    return TransformerForCausalLM(
        TransformerConfig(
            hidden_size=arch["width"], num_hidden_layers=len(arch["pattern"]) // 2, num_heads=a["heads"],
            intermediate_size=d["width"], max_position_embeddings=SEQ_LEN["cuda"], tie_word_embeddings=True,
            fuse_linear_cross_entropy=True,
            fuse_cross_entropy=False, use_cache=False, vocab_size=vocab,
        )
    )  # fmt: skip


def _fla_mamba2(arch: Mapping[str, Any], vocab: int) -> Any:
    from fla.models import Mamba2Config, Mamba2ForCausalLM

    m = arch["blocks"]["m"]
    return Mamba2ForCausalLM(
        Mamba2Config(
            hidden_size=arch["width"], num_hidden_layers=len(arch["pattern"]), head_dim=m["head_dim"], state_size=m["state_size"],
            expand=m["expand"], n_groups=m["groups"], conv_kernel=m["conv_width"], chunk_size=m["chunk"],
            tie_word_embeddings=True, fuse_linear_cross_entropy=True, fuse_cross_entropy=False, use_cache=False, vocab_size=vocab,
        )
    )  # fmt: skip


def _mamba_ssm_mamba2(arch: Mapping[str, Any], vocab: int) -> Any:
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    m = arch["blocks"]["m"]
    cell = {"layer": "Mamba2", "d_state": m["state_size"], "headdim": m["head_dim"]}
    cell |= {"expand": m["expand"], "chunk_size": m["chunk"]}
    return MambaLMHeadModel(MambaConfig(d_model=arch["width"], n_layer=len(arch["pattern"]), vocab_size=vocab, ssm_cfg=cell))


PEERS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "flash-linear-attention Mamba2": (("mamba2_130m", "mamba2_1p3b", "mamba2_370m"), _fla_mamba2),
    "flash-linear-attention transformer": (("transformer_130m", "transformer_1p3b"), _fla_transformer),
    "mamba-ssm Mamba2": (("mamba2_130m", "mamba2_1p3b", "mamba2_370m"), _mamba_ssm_mamba2),
}


def their_step(make: Callable[..., Any], model: Mapping[str, Any], device: torch.device, micro_batch: int, seq_len: int) -> Any:
    """The same step of a peer's model: bf16 autocast, fp32 weights, clipping, fused AdamW. Their number of parameters, and it."""
    theirs = make(model, model["vocab_size"]).to(device, torch.float32).train()
    optim = torch.optim.AdamW(theirs.parameters(), lr=3e-4, betas=ADAMW["betas"], eps=ADAMW["eps"], fused=True)
    batch = tokens(model["vocab_size"], micro_batch, seq_len, device)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16):
            if type(theirs).__name__ == "MambaLMHeadModel":  # computes no loss of its own
                logits = theirs(batch.inputs_BT).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.labels_BT.flatten())
            else:
                loss = theirs(input_ids=batch.inputs_BT, labels=batch.inputs_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)
        return float(loss)

    return sum(p.numel() for p in theirs.parameters()), step


def peers(report: Report, device: torch.device, rates: Mapping[str, float]) -> None:
    if device.type != "cuda":
        report.found["not_measured"].append("peers: flash-linear-attention's and mamba-ssm's models need a CUDA device")
        report.write()
        return
    turns = [(peer, name) for peer, (names, _) in PEERS.items() for name in names]
    order = list(MODELS["cuda"])
    for peer, name in sorted(turns, key=lambda turn: order.index(turn[1])):
        report.item("peers", f"{peer}: {name}", partial(side_by_side, peer, name, device, rates), seconds=60)


def side_by_side(peer: str, name: str, device: torch.device, rates: Mapping[str, float]) -> dict[str, Any]:
    """Steps of both in turns; a peer that is not installed, or lacks what it needs, is not run."""
    model = architecture(name, MODELS["cuda"][name], device)
    seq_len = SEQ_LEN["cuda"]
    size = fitting(model, seq_len, device, SHARE / 2)
    if peer.startswith("mamba-ssm"):
        size = min(size, 4)  # it keeps all logits in fp32, and their gradient
    with _fresh(device, deterministic=False):
        try:
            count, theirs = their_step(PEERS[peer][1], model, device, size, seq_len)
        except ImportError as error:  # flash-linear-attention's transformer, for one, insists on flash-attn
            return {"not_run": str(error)}
        ours = stepper(model, device, size, seq_len, "auto")
        for _ in range(WARM_STEPS):
            theirs(), ours()
        timings = in_turns({"zexp": ours, "peer": theirs}, device, seconds=20, least=3)
        found = {side: speed(model, timing, size, seq_len, rates) for side, timing in timings.items()}
    found["peer"]["parameters"] = count
    return found | {"zexp_over_peer": found["zexp"]["tokens_per_second"] / found["peer"]["tokens_per_second"]}


# All


@contextmanager
def _fresh(device: torch.device, deterministic: bool) -> Any:
    """Nothing of earlier work in memory, and peaks counted from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
        synchronize(device)
    finally:
        torch.use_deterministic_algorithms(before)


def peak_rates(device: torch.device, ceilings: Mapping[str, float]) -> dict[str, float]:
    """FLOP/s in bf16 that a share is of: the vendor's figure, and the best product of matrices here."""
    rates = {"of_measured": ceilings["matmul_bf16"]}
    known = named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is not None:
        rates["of_vendor"] = DEVICES[known].flops["bf16"]
    return rates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="after which nothing more is begun (20)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--out", type=Path, default=None, help="benchmarks/results/gpu.json, or gpu_on_cpu.json")
    options = parser.parse_args()
    device = torch.device(setting.device_of(options.device))
    out = options.out or RESULTS / ("gpu.json" if device.type == "cuda" else "gpu_on_cpu.json")
    report = Report(out, device, options.minutes)
    if device.type == "cpu":
        report.found["note"] = "run on a CPU, with tiny sizes: it shows that the script runs to its end, and nothing about a GPU"
        report.found["not_measured"] += [
            *kernels.not_measured(device),
            "parity of fused backends: they run on a CUDA device",
            "peak memory against the estimate: torch counts a GPU's allocations only",
        ]
    report.found["ceilings"] = ceilings = machine.ceilings(device)
    report.write()
    rates = peak_rates(device, ceilings)
    if "parity" in options.only:
        parity(report, device)
    if "kernels" in options.only:
        for operation in sorted(select.BACKENDS):
            table = partial(kernels.run, device.type, dtype="bf16", operations=[operation], seconds=1.0, ceilings=ceilings)
            report.item("kernels", operation, lambda table=table: table()["rows"], seconds=15 if device.type == "cuda" else 0)
    if "steps" in options.only:
        steps(report, device, rates)
    if "peers" in options.only:
        peers(report, device, rates)
    report.found["ran_to_its_end"] = not report.found["skipped"]
    report.write()
    summary(report.found)
    print(f"Written to {report.path}")
    return 1 if report.found["failed"] else 0


def summary(found: Mapping[str, Any]) -> None:
    for name, step in found["parts"]["steps"].items():
        if "error" in step:
            print(f"{name}: {step['error'].splitlines()[0]}")
            continue
        shares = ", ".join(f"{100 * share:.1f} % {which.replace('_', ' ')}" for which, share in step["mfu"].items())
        ratio = step["memory"]["ratio"]
        memory_text = "" if ratio is None else f", memory {ratio:.2f} × the estimate"
        print(f"{name}: {step['tokens_per_second']:,.0f} tokens/s, MFU {shares}{memory_text}")
    for name, pair in found["parts"]["peers"].items():
        said = pair.get("error") or pair.get("not_run") or f"zexp {pair['zexp_over_peer']:.2f} ×"
        print(f"{name}: {said.splitlines()[0]}")
    for text in (*found["skipped"], *found["not_measured"]):
        print(f"Not measured: {text}")


if __name__ == "__main__":
    sys.exit(main())
