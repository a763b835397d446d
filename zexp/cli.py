"""The verbs of the command line. Everything heavy is imported by the verb that needs it: `zexp --help` imports nothing."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Callable

USAGE = """\
zexp: which hybrid language model, and which annealing recipe? Studies as trees of training trajectories.

  zexp run  [overrides]         train, evaluate, report what the config says; what is in the store is not done again
  zexp plan [--json] [overrides]    the tree of stages, what is cached, tokens, hours, memory and disk; starts nothing
  zexp plan --why A [B] [overrides]    in which keys two stages differ; one: from what is nearest to it in the store
  zexp status [--json] [--watch] [STUDY]   studies in the store and how far they are
  zexp report [--json] STUDY    tables and one HTML leaderboard, also of half a study
  zexp calc [--json] [overrides]    parameters, FLOPs per token and memory of an architecture, per block
  zexp calc budget gpus=64 days=14 device=h100 [overrides]    what it can be trained on in that time
  zexp bench blocks|step|data|size|kernels   how fast this machine is at them, as shares of what it can do
  zexp logs [-f] STAGE|STUDY/VARIANT   the log of a stage's last attempt
  zexp cancel STUDY|STAGE       stop its jobs and processes; running trainings write a state first
  zexp export RUN --hf DIR      a trained model as transformers loads it (--safetensors DIR: any model)
  zexp sample RUN "prompt"      text that a trained model writes
  zexp store ls|du|verify|gc|rm|export|import   what the store holds: to see, check, thin out, carry elsewhere
  zexp init DIR                 a small folder of your own: an architecture, a mix over local text, a study

Overrides are Hydra's:      zexp run arch=zamba2_tiny anneal=replay60
several values are a study: zexp run -m arch=mamba2_tiny,zamba2_tiny seed=0,1,2
a named study:              zexp run +sweeps=quickstart
one verb's own help:        zexp run --help

Exit codes: 0 all done · 1 a stage failed or diverged · 2 the request was wrong, nothing was started · 130 interrupted.
"""

HYDRA_VERBS = ("run", "plan", "calc")
# Verb -> the module that has a function of its name.
MODULES = {
    "status": "running", "logs": "running", "cancel": "running",
    "report": "verbs", "export": "verbs", "sample": "verbs", "init": "verbs", "store": "store_verb", "bench": "bench_verb",
}  # fmt: skip
OTHER_VERBS = tuple(MODULES)


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; the exit code. arguments: without the program's name; None = sys.argv's."""
    if arguments is None:  # a process of our own, full of configs that live as long as it does
        gc.set_threshold(100_000, 20, 20)
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in ("-sc", "--shell-completion"):
        offered = _verbs_completed(words)
        if offered is not None:
            print("\n".join(offered))
            return 0
        words = _completion(words)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if words[0] in ("-V", "--version"):
        from zexp import __version__

        print(f"zexp {__version__}")
        return 0
    verb, rest = words[0], words[1:]
    if verb in HYDRA_VERBS:
        from zexp.hydra_app import hydra_verb

        return _guarded(lambda: hydra_verb(verb, rest), trains=verb in ("run", "plan"))
    if verb not in OTHER_VERBS:
        import difflib

        near = difflib.get_close_matches(verb, [*HYDRA_VERBS, *OTHER_VERBS], n=1)
        hint = f" Did you mean `zexp {near[0]}`?" if near else ""
        print(f"zexp: {verb!r} is no verb.{hint} `zexp --help` lists them.", file=sys.stderr)
        return 2
    module = importlib.import_module(f"zexp.{MODULES[verb]}")
    return _guarded(lambda: getattr(module, verb)(rest), trains=False)


def _verbs_completed(words: list[str]) -> list[str] | None:
    """What stands for a word that no config completes: the verb, or a study's name behind it. None for Hydra's part."""
    if not any(word.startswith("query=") for word in words):
        return None
    line = os.environ.get("COMP_LINE", "")
    point = int(os.environ.get("COMP_POINT") or len(line))
    parts = line[:point].split(" ")
    if len(parts) <= 2:
        return [verb for verb in (*HYDRA_VERBS, *OTHER_VERBS) if verb.startswith(parts[-1] if len(parts) == 2 else "")]
    if parts[1] in ("status", "report", "cancel"):
        from zexp import verbs

        return [name for name in verbs.studies() if name.startswith(parts[-1])]
    if parts[1] in ("logs", "export", "sample") and len(parts) == 3:
        from zexp import verbs

        return verbs.runs(parts[2])
    if parts[1] == "store":
        from zexp import store_verb

        return list(store_verb.completed(parts[2:]))
    if parts[1] == "bench":
        from zexp import bench_verb

        return bench_verb.completed(parts[2:])
    return [] if parts[1] in OTHER_VERBS else None


def _completion(words: list[str]) -> list[str]:
    """Hydra's completion calls the bare program; the verb stands in the line that is being completed."""
    line = os.environ.get("COMP_LINE", "")
    parts = line.split(" ")
    verbs = 2 if parts[1:2] == ["bench"] and len(parts) > 2 else 1 if len(parts) > 1 and parts[1] in HYDRA_VERBS else 0
    if verbs:
        os.environ["COMP_LINE"] = " ".join([parts[0], *parts[1 + verbs :]])
        point = os.environ.get("COMP_POINT")
        if point is not None:
            os.environ["COMP_POINT"] = str(max(0, int(point) - sum(len(part) + 1 for part in parts[1 : 1 + verbs])))
    return [parts[1] if verbs == 1 else "run", *words]


def _guarded(verb: Callable[[], int], *, trains: bool) -> int:
    """A wrong request ends with its text and 2; Ctrl-C with 130; a closed pipe quietly.

    trains: the verb is about a training, and whoever reads of its problems wants to know that none was started.
    """
    from zexp.config.errors import ConfigError
    from zexp.store.errors import StoreError

    try:
        return verb()
    except ConfigError as error:
        many = len(error.problems) > 1
        for problem in error.problems:
            print(f"{'  ' if many else ''}ConfigError: {problem}", file=sys.stderr)
        if many:
            print(f"{len(error.problems)} problems{'; no training was started' if trains else ''}.", file=sys.stderr)
        return 2
    except StoreError as error:
        print(f"StoreError: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it at its exit
        return 0


if __name__ == "__main__":
    sys.exit(main())
