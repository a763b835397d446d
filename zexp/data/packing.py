"""A corpus cut into bins: one bin is one sequence of seq_len labels.

Strategy `concat`: windows of stride L over the row of tokens, each read with one token more than its L labels, since a
label is the token after.  What is left at the end is less than a window: the tail, dropped and counted.

The packing holds no tokens, only where each bin starts in the corpus, so a second seq_len costs next to nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from zexp.data import corpus
from zexp.store import files
from zexp.store.attempt import Attempt
from zexp.store.folder import StageFolder, Store


def run(store: Store, folder: StageFolder, request: dict[str, Any], attempt: Attempt) -> str:
    """The stage: result/starts.bin (int64, one a bin) and result/manifest.json {bins, seq_len, tokens, tail, padding}.

    tokens: labels in all bins. tail: labels that the corpus has and no bin. padding: labels that are no text (0 here).
    """
    semantic = folder.semantic()
    seq_len = semantic["seq_len"]
    made = files.read_json(corpus.result(store, semantic["corpus"]) / files.MANIFEST)
    labels = made["tokens"] - 1  # the first token is nobody's label
    bins = labels // seq_len
    scratch = attempt.scratch("packing")
    (scratch / "starts.bin").write_bytes((np.arange(bins, dtype="<i8") * seq_len).tobytes())
    manifest = {
        "bins": bins,
        "seq_len": seq_len,
        "tokens": bins * seq_len,
        "tail": labels - bins * seq_len,
        "padding": 0,
        "corpus": semantic["corpus"],
    }
    files.write_json(scratch / files.MANIFEST, manifest)
    attempt.publish(scratch, "result")
    attempt.progress(bins, bins, "bins")
    return "done"
