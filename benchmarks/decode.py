"""Generation on CPU, beside `transformers`' generate: a prompt of 4,096 tokens, then token after token, greedily, at batch 1.

    python benchmarks/decode.py [--json] [--models zamba2 …] [--settings fp32 bf16] [--rounds 5] [--out benchmarks/results/decode.json]

Both sides have the same weights and the same prompt. Each is a process of its own; they take turns, so that other work on the
machine hits both. Ours is what `zexp sample` calls (zexp.model.sample.generate), theirs `model.generate` with its cache and a
streamer, as it comes. Both clocks start with the call: `prefill` is the time to the first token, `token` the time of the others
divided by their number, so that what a side sets up before its first token does not count as decoding. `forward` is our forward pass
as in training (with what it keeps for a backward pass, no cache, no head) of the prompt. A ratio is of the medians of the rounds,
theirs / ours; the first round of each side is not counted.

Weights are fp32, or bf16 on both sides. Before the rounds they generate once, and our logits after each of *their* tokens are
compared with theirs: `largest_logit_difference` over a standard deviation of `logits_std`, and whether the greedy tokens are the same
wherever they differ by more than that. Sizes are those of benchmarks/step.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import step

SETTINGS = ("fp32", "bf16")
GOALS = {"zamba2": 3.0}  # asked of zexp: tokens/s after a prompt of 4,096, theirs as it comes = 1
MEASURED = ("prefill", "token", "forward")


def prompt(length: int) -> list[int]:
    """Token ids; none is 0, which Zamba2 takes for padding."""
    import torch

    found: list[int] = torch.randint(1, step.VOCAB, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    return found


class Clock:
    """When each token came, since it was made. Also a streamer of theirs."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.times: list[float] = []
        self.tokens: list[int] = []
        self._prompt_is_to_come = True

    def token(self, token: int) -> None:
        self.times.append(time.perf_counter() - self._began)
        self.tokens.append(token)

    def put(self, value: Any) -> None:
        """Of a streamer: the prompt, then each token."""
        if not self._prompt_is_to_come:
            self.token(int(value))
        self._prompt_is_to_come = False

    def end(self) -> None:
        """Of a streamer."""

    def seconds(self) -> dict[str, Any]:
        later = len(self.times) - 1
        return {"prefill": self.times[0], "token": (self.times[-1] - self.times[0]) / later, "tokens": self.tokens}


class Ours:
    def __init__(self, folder: Path, dtype: Any):
        from zexp.train.machine import keep_freed_memory

        keep_freed_memory()
        self.model = step.our_model(folder).to(dtype)

    def generate(self, ids: list[int], count: int) -> dict[str, Any]:
        from zexp.model.sample import generate

        self.model.eval()
        clock = Clock()
        for token in generate(self.model, ids, tokens=count, temperature=0, top_p=1.0, seed=0, eod_id=-1):
            clock.token(token)
        return clock.seconds()

    def forward(self, ids: list[int]) -> dict[str, Any]:
        import torch

        self.model.train()
        tokens = torch.tensor([ids])
        began = time.perf_counter()
        self.model(tokens)
        return {"forward": time.perf_counter() - began}

    def logits(self, ids: list[int], following: list[int]) -> Any:
        """(tokens, V) fp32: after the prompt, and after each of the tokens but the last."""
        import torch

        self.model.eval()
        cache = self.model.new_cache(1)
        rows = []
        for piece in (ids, *([token] for token in following[:-1])):
            rows.append(self.model.logits(self.model.decode(torch.tensor([piece]), cache)[0, -1]))
        return torch.stack(rows)


class Theirs:
    def __init__(self, folder: Path, dtype: Any):
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.model.generation_config.eos_token_id = None  # no token ends a text

    def generate(self, ids: list[int], count: int) -> dict[str, Any]:
        clock = Clock()
        self._generated(ids, count, streamer=clock)
        return clock.seconds()

    def logits(self, ids: list[int], count: int) -> tuple[list[int], Any]:
        """Greedy tokens, and the logits, (tokens, V) fp32, that chose them."""
        import torch

        made = self._generated(ids, count, output_logits=True, return_dict_in_generate=True)
        return made.sequences[0, len(ids) :].tolist(), torch.cat(made.logits).float()

    def _generated(self, ids: list[int], count: int, **options: Any) -> Any:
        import torch

        tokens = torch.tensor([ids])
        return self.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=count, use_cache=True, **options
        )


# One side's process


def serve(side: str, folder: Path, setting: str, threads: int) -> None:
    """Answers on stdout, one JSON line each, to requests on stdin: [what, context, new tokens, a file of logits]."""
    import torch

    torch.set_num_threads(threads)
    one: Any = {"ours": Ours, "theirs": Theirs}[side](folder, {"fp32": torch.float32, "bf16": torch.bfloat16}[setting])
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        what, context, count, path = json.loads(line)
        ids = prompt(context)
        said: dict[str, Any] = {}
        if what == "generate":
            said = one.generate(ids, count)
        elif what == "forward":
            said = one.forward(ids)
        elif side == "theirs":
            torch.save(one.logits(ids, count), path)
        else:
            said = differences(*torch.load(path), one, ids)
        print(json.dumps(said | {"peak_mb": step.peak_mb()}), flush=True)


def differences(tokens: list[int], theirs_TV: Any, ours: Ours, ids: list[int]) -> dict[str, Any]:
    ours_TV = ours.logits(ids, tokens).detach().float()
    apart = (ours_TV - theirs_TV).abs().amax(-1)
    best_two = theirs_TV.topk(2).values
    sure = best_two[:, 0] - best_two[:, 1] > 2 * apart  # no difference that was seen could have changed the choice
    same = ours_TV.argmax(-1) == theirs_TV.argmax(-1)
    return {
        "largest_logit_difference": float(apart.max()),
        "logits_std": float(theirs_TV.std()),
        "compared": len(tokens),
        "same_tokens": int(same.sum()),
        "sure_tokens": int(sure.sum()),
        "sure_tokens_are_the_same": bool(same[sure].all()),
    }


class Side(step.Served):
    """What one side was asked, and the seconds that it said."""

    def __init__(self, side: str, folder: Path, setting: str, threads: int):
        super().__init__(__file__, side, folder, setting, threads)
        self.peak = 0.0
        self.seconds: dict[str, list[float]] = {name: [] for name in MEASURED}

    def ask(self, what: str, context: int, count: int = 0, path: str = "") -> dict[str, Any]:
        said = self.asked(json.dumps([what, context, count, path]))
        self.peak = said["peak_mb"]
        for name in MEASURED:
            if name in said:
                self.seconds[name].append(said[name])
        return said

    def result(self) -> dict[str, Any]:
        later = {name: seconds[1:] or seconds for name, seconds in self.seconds.items() if seconds}
        return {
            "side": self.side,
            "setting": self.setting,
            "rounds": len(later["token"]),
            "median_seconds": {name: statistics.median(seconds) for name, seconds in later.items()},
            "best_seconds": {name: min(seconds) for name, seconds in later.items()},
            "tokens_per_second": 1 / statistics.median(later["token"]),
            "peak_mb": self.peak,
        }


# The comparison


def compare(name: str, folder: Path, setting: str, options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    sides = [Side(side, folder, setting, options.threads) for side in ("ours", "theirs")]
    mine, peer = sides
    path = str(folder / f"logits_{setting}.pt")
    peer.ask("logits", options.context, options.tokens, path)
    found = mine.ask("logits", options.context, options.tokens, path)
    del found["peak_mb"]
    say(f"{name} {setting}: {found}")
    for turn in range(options.rounds + 1):
        for one in sides if turn % 2 == 0 else reversed(sides):
            one.ask("generate", options.context, options.tokens)
            if one is mine:
                one.ask("forward", options.context)
    results = [one.result() for one in sides]
    for one in sides:
        one.close()
    ours, theirs = (one["median_seconds"] for one in results)
    return {
        "model": name,
        "setting": setting,
        "results": results,
        "decode_over_theirs": theirs["token"] / ours["token"],
        "prefill_over_theirs": theirs["prefill"] / ours["prefill"],
        "prefill_over_forward": ours["forward"] / ours["prefill"],
        "checks": found,
        "goal": GOALS.get(name),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout (progress goes to stderr)")
    parser.add_argument("--models", nargs="*", choices=list(step.MODELS), default=["zamba2", "mamba2", "llama"])
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=["fp32"], help="what weights and caches are in")
    parser.add_argument("--context", type=int, default=4096, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=65, help="generated tokens: the first is the prefill's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="of each side after its first")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    parser.add_argument("--serve", nargs=3, metavar=("SIDE", "FOLDER", "SETTING"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tokens < 2 or options.context < 1 or options.rounds < 1:
        parser.error("at least 2 tokens after a context of 1, in 1 round")
    if options.threads < 1:
        parser.error("at least 1 thread")
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

    torch.set_num_threads(options.threads)  # of this process: what the facts say of the others
    facts: dict[str, Any] = {
        "machine": machine.facts("cpu"),
        "transformers": transformers.__version__,
        "threads": options.threads,
        "context": options.context,
        "tokens": options.tokens,
        "models": [],
    }
    with tempfile.TemporaryDirectory() as parent:
        for name in options.models:
            folder = Path(parent, name)
            step.make(*step.MODELS[name], folder)
            for setting in options.settings:
                one = compare(name, folder, setting, options, say)
                facts["models"].append(one)
                ours, theirs = (side["median_seconds"] for side in one["results"])
                say(
                    f"{name} {setting}: {1e3 * ours['token']:.2f} ms a token, theirs {1e3 * theirs['token']:.2f}: "
                    f"{one['decode_over_theirs']:.2f} times; prefill {ours['prefill']:.2f} s, theirs {theirs['prefill']:.2f}: "
                    f"{one['prefill_over_theirs']:.2f} times; training's forward {ours['forward']:.2f} s: "
                    f"{one['prefill_over_forward']:.2f}"
                )
    facts["seconds"] = time.perf_counter() - began
    text = json.dumps(facts, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    if options.json:
        print(text)


if __name__ == "__main__":
    main()
