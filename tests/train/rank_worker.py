"""A task of a job of several ranks, as a launcher starts it: python -m tests.train.rank_worker STORE REQUEST [MISHAP].

Prints how the stage ended. MISHAP happens to the rank that RANK or SLURM_PROCID says is 1, in its third step.
"""

import json
import os
import sys
import time

import torch

from zexp.study.ranks import run_task
from zexp.train import fingerprint, loop

MINE = os.environ.get("RANK", os.environ.get("SLURM_PROCID")) == "1"


def main() -> None:
    mishap = sys.argv[3] if len(sys.argv) > 3 and MINE else ""
    good, kind, calls = loop.backward, fingerprint.fingerprint, []

    def backward(model, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            if mishap == "raise":
                raise torch.OutOfMemoryError("no room for the third step")
            if mishap == "hang":
                time.sleep(600)
            if mishap == "drift":
                model.norm.weight.data[0] += 1e-6
        return good(model, *args, **kwargs)

    loop.backward = backward
    if mishap == "other kind":
        fingerprint.fingerprint = lambda *args: {**kind(*args), "cpu_capability": "AVX9"}
    ended = run_task(sys.argv[1], json.loads(sys.argv[2]))
    print(ended.result, ended.error or "", flush=True)


if __name__ == "__main__":
    main()
