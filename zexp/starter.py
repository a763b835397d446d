"""What `zexp init` writes: texts, an architecture, a corpus over the texts, a mix and a study, all small.

With --from-hf the architecture, the tokenizer and the initial weights are those of a checkpoint.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import yaml

from zexp.config.errors import ConfigError
from zexp.data import published
from zexp.model.hf import folder as checkpoints
from zexp.model.hf.entries import Unreadable
from zexp.model.hf.table import family_for
from zexp.store.files import write_atomic
from zexp.store.fingerprint import DigestCache

ARCH = """\
# Two Mamba2 layers around one attention layer. `zexp calc +sweeps=mine` counts it.
pattern: m a d m
width: 64
tie_embeddings: true
norm: {kind: rmsnorm, eps: 1e-5}
blocks:
  m: {expand: 2, state_size: 16, head_dim: 16, groups: 1, conv_width: 4, chunk: 64}
  a: {heads: 4, rope_theta: 10000.0}
  d: {width: 171, activation: swiglu}
"""

CORPUS = """\
# Your own files; one document a paragraph. Paths are relative to the folder in which zexp is started.
sources:
  mine: {kind: text, files: texts/*.txt, documents: paragraph}
tokenizer: {kind: bpe, vocab_size: 512}
packing: {strategy: concat, document_mask: true}
heldout: 0.1
"""

MIX = """\
sources:
  mine: {weight: 1, max_epochs: null}    # null: as many passes as it takes
"""

STUDY = """\
# @package _global_
defaults:
  - override /arch: mine
  - override /corpus: mine
  - override /mix: mine
  - override /eval: bpb
study:
  name: mine
  question: Does a re-warmed anneal beat going on at once, on my own text?
  arms:
    rewarmed: [anneal.warmup_tokens=2K]
    straight: [anneal.warmup_tokens=0]
  seeds: [0]
  baseline: {arm: straight}
  metric: bpb_mine/bits_per_byte
seq_len: 128
phases: {pretrain: {tokens: 24K, batch_tokens: 1024}}
schedule: {warmup_tokens: 2K}
anneal: {tokens: 8K}
hydra: {mode: MULTIRUN}
"""

README = """\
# A zexp folder

    zexp plan +sweeps=mine      the tree; starts nothing
    zexp run +sweeps=mine       train, score, compare

texts/ is what it trains on: put your own files there. conf/ holds the choices that are yours (arch, corpus, mix and the
study under sweeps/); everything else comes from zexp.
"""


def _texts() -> dict[str, str]:
    """Paragraphs with something to learn in them: sums and orders, written out."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    sums = [
        f"{words[a]} and {words[b]} make {a + b}. {words[b]} and {words[a]} make {b + a} as well, for the order of "
        f"a sum does not matter: {a} + {b} = {b} + {a} = {a + b}."
        for a in range(11)
        for b in range(11)
    ]
    orders = [
        f"{words[a]} is {'less than' if a < b else 'more than' if a > b else 'the same as'} {words[b]}, and the "
        f"difference between {words[a]} and {words[b]} is {abs(a - b)}: counting from {min(a, b)} to {max(a, b)} takes "
        f"{abs(a - b)} steps."
        for a in range(11)
        for b in range(11)
    ]
    return {"sums.txt": "\n\n".join(sums) + "\n", "orders.txt": "\n\n".join(orders) + "\n"}


def _from_checkpoint(path: Path) -> dict[str, str]:
    """Architecture, corpus and study that go on from such a folder. Raises ConfigError if it is not whole."""
    key = "--from-hf"
    found = checkpoints.read(path, key)
    family = family_for(found.config, found.where)
    try:
        arch = family.arch(found.config)
        checkpoints.check(found, family.resolved(found.config), key)
    except Unreadable as error:
        raise ConfigError(f"{found.where} is no model that zexp can have: {error}") from error
    tokens = published.semantic({"path": str(path)}, Path(), DigestCache(None))["vocab_size"]
    if arch["vocab_size"] < tokens:
        raise ConfigError(
            f"{key}: the embedding in {path} has {arch['vocab_size']} rows, and its tokenizer.json has token ids up to "
            f"{tokens - 1}: {tokens - arch['vocab_size']} tokens have no row.\n"
            "  Copy the tokenizer that the model was trained with into the folder, or give the model the rows with "
            f"transformers: model.resize_token_embeddings({tokens}), then save_pretrained()."
        )
    arch["pattern"] = _repeated(arch["pattern"], len(family.unit))
    blocks = arch.pop("blocks")
    written = yaml.safe_dump({**arch, "blocks": blocks}, sort_keys=False, default_flow_style=None, width=110)
    where = json.dumps(str(path))  # JSON's quotes are YAML's
    tokenizer = "tokenizer: {kind: bpe, vocab_size: 512}\n"
    seq_len = "seq_len: 128\n"
    assert tokenizer in CORPUS and seq_len in STUDY
    title = f"# What {found.where} describes, a {family.class_name}. `zexp calc +sweeps=mine` counts it.\n"
    return {
        "conf/arch/mine.yaml": title + written,
        "conf/corpus/mine.yaml": CORPUS.replace(tokenizer, f"tokenizer: {{kind: hf, path: {where}}}\n"),
        "conf/sweeps/mine.yaml": STUDY.replace(seq_len, f"init: {{from_hf: {where}}}\n{seq_len}").replace(
            "schedule: {", "schedule: {peak_lr: 3e-4, "
        ),
    }


def _repeated(layers: list[str], size: int) -> str:
    """The layers, `size` of them belonging together, as a pattern with repeats."""
    cut = [" ".join(layers[start : start + size]) for start in range(0, len(layers), size)]
    runs = [(one, len(list(group))) for one, group in itertools.groupby(cut)]
    parts = [one if times == 1 else f"{times}*({one})" if " " in one else f"{times}*{one}" for one, times in runs]
    return " ".join(parts)


def write(folder: Path, from_hf: Path | None = None) -> list[Path]:
    """Write the files; the paths. Raises ConfigError naming files that are already there.

    from_hf: a checkpoint's folder that the study goes on from.
    """
    contents = {
        "README.md": README,
        "conf/arch/mine.yaml": ARCH,
        "conf/corpus/mine.yaml": CORPUS,
        "conf/mix/mine.yaml": MIX,
        "conf/sweeps/mine.yaml": STUDY,
        **(_from_checkpoint(from_hf.absolute()) if from_hf is not None else {}),
        **{f"texts/{name}": text for name, text in _texts().items()},
    }
    there = [str(folder / name) for name in contents if (folder / name).exists()]
    if there:
        raise ConfigError(f"zexp init overwrites nothing, and there is already: {', '.join(there)}. Name another folder.")
    try:
        for name, text in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / name, text)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}. Name another folder.") from error
    return [folder / name for name in contents]
