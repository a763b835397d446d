"""Every key that a user can set, with its unit, its default and whether it is part of the identity.

`Run` is the root of a composed config; Hydra checks keys and types against it (the node `schema` of conf/config.yaml).
Token counts are `Any` here because a dataclass `int` refuses `10M`; zexp.config.tokens parses them.
Sizes of blocks are typed by the blocks themselves (zexp/blocks/*/spec.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from omegaconf import MISSING

from zexp.config.identity import execution, semantic

# OmegaConf 2.3 reads the annotations of structured configs; `Optional[X]` is what it knows for dataclasses.


@dataclass(kw_only=True)
class Norm:
    """The normalisation in front of every block and before the head."""

    kind: str = semantic("rmsnorm")  # rmsnorm | layernorm (with bias)
    eps: float = semantic(1e-5)
    final: Optional[str] = semantic(None, absent=None)  # the kind after the last layer; null = kind
    embedding: bool = semantic(False, absent=False)  # one more after the embedding (RWKV)


@dataclass(kw_only=True)
class Parallel:
    """How the branches of a layer like `(a|m)` are fed and joined."""

    combine: str = semantic("sum")  # sum | mean | scaled_mean (a norm with a weight per channel for each branch, then the mean)
    norms: str = semantic("shared")  # shared: one norm feeds all branches | separate: one each (GPT-NeoX)


@dataclass(kw_only=True)
class Arch:
    """An architecture: a pattern over named blocks and one table of sizes a letter."""

    pattern: Any = semantic(MISSING)  # layers: `4*(a d)`, a list of such, or {layers: 38, fill: m, at: {gm: [5, 11]}}
    width: int = semantic(MISSING)  # model width D
    tie_embeddings: bool = semantic(True)  # the head is the embedding's transpose
    norm: Norm = semantic(factory=Norm)
    parallel: Parallel = semantic(factory=Parallel, absent=Parallel())
    logit_softcap: Optional[float] = semantic(None, absent=None)  # c: logits become c · tanh(logits / c); null = not
    vocab_size: Optional[int] = semantic(None, absent=None)  # rows of the embedding; null = the tokenizer's
    blocks: dict[str, Any] = semantic(factory=dict)  # letter -> that block's keys
    match: Any = semantic(None, absent=None)  # {parameters: 10M}: width and MLP widths are solved for


@dataclass(kw_only=True)
class Source:
    """Where documents come from."""

    kind: Optional[str] = semantic(None)  # embedded | text | jsonl | parquet
    view: Optional[str] = semantic(None)  # embedded: base (code without docstrings) | high_quality (docstrings)
    packages: Optional[list[str]] = semantic(None)  # embedded: of stdlib, numpy, scipy, topics; null = the view's all
    files: Any = semantic(None)  # others: a glob or a list of globs, relative to the working directory
    documents: Optional[str] = semantic(None)  # text: one document is a file (default) | line | paragraph
    text_key: Optional[str] = semantic(None)  # jsonl, parquet: the key that holds the text (default: text)
    max_bytes: Any = semantic(None)  # bound in UTF-8 bytes, in shuffled document order; null = all


@dataclass(kw_only=True)
class MixSource(Source):
    """A source's share in a mix. Without `kind`, the name stands in corpus.sources."""

    weight: float = semantic(MISSING)  # relative to the others; quantised to k/4096
    max_epochs: Optional[int] = execution(4)  # passes over the source in the whole run; null = no cap. Refuses, never alters


@dataclass(kw_only=True)
class Mix:
    """Which sources a phase reads, and in which proportions."""

    sources: dict[str, MixSource] = semantic(factory=dict)


@dataclass(kw_only=True)
class Tokenizer:
    """A byte-level BPE trained on corpus.sources (bpe), or a published one (hf)."""

    kind: str = semantic("bpe")  # bpe | hf
    vocab_size: int = semantic(4096)  # bpe: with <|eod|>, id 0. An hf tokenizer has its own
    sample_bytes: Any = semantic("3M")  # bpe: bytes of training text read, over all sources together
    weights: Optional[dict[str, float]] = semantic(None)  # bpe: each source's share of the sample; null = equal
    path: Optional[str] = semantic(None, absent=None)  # hf: a folder with a tokenizer.json; it counts by its content
    eod: Optional[str] = semantic(None, absent=None)  # hf: the token that begins and ends documents; null = its eos_token


@dataclass(kw_only=True)
class Packing:
    """How documents become sequences of seq_len labels."""

    strategy: str = semantic("concat")  # joined by eod and cut into windows; the tail is dropped and counted
    document_mask: bool = semantic(True)  # attention, scans and convolutions stop at document boundaries


@dataclass(kw_only=True)
class Corpus:
    """The named sources, their tokenizer and their packing."""

    sources: dict[str, Source] = semantic(factory=dict)
    tokenizer: Tokenizer = semantic(factory=Tokenizer)
    packing: Packing = semantic(factory=Packing)
    heldout: float = semantic(0.1)  # share kept out of training, by a stable hash of the file or document
    seed: int = semantic(0)  # order of the documents within a corpus


@dataclass(kw_only=True)
class Schedule:
    """The learning rate of a phase over its tokens. Keys that a kind does not read must be null."""

    kind: str = semantic(MISSING)  # constant | linear | cosine | wsd
    peak_lr: float = semantic(MISSING)
    warmup_tokens: Any = semantic(0)  # linear from 0; rounded up to whole steps
    decay: Any = semantic(None)  # wsd: length of the decay, tokens or a share of the phase (10%)
    decay_shape: Optional[str] = semantic(None)  # wsd: linear | cosine | exponential | one_minus_sqrt
    floor_fraction: Optional[float] = semantic(None)  # linear, cosine, wsd: the last LR as a fraction of the peak


@dataclass(kw_only=True)
class Phase:
    """A stretch of training: what it continues from, how long, on what, with which learning rate."""

    parent: Optional[str] = semantic(None)  # a phase's name; null = from initial weights
    seed: Optional[int] = semantic(None)  # order of the sources this phase introduces; null = the root's seed
    tokens: Any = semantic(MISSING)  # length: 10M, or 10% of the parent's tokens; rounded up to whole steps
    batch_tokens: Any = semantic(None)  # global batch; null = the parent's
    mix: Optional[Mix] = semantic(None)  # null = the root's mix
    schedule: Optional[Schedule] = semantic(None)  # null = the root's schedule
    optimizer_state: str = semantic("carry")  # over the fork: carry | reset


@dataclass(kw_only=True)
class Replay:
    """The share of an anneal that goes on with the parent's stream."""

    fraction: float = semantic(MISSING)  # of the anneal's tokens, 0 … 1
    start: str = semantic("continue")  # continue | beginning of the parent's stream


@dataclass(kw_only=True)
class Anneal:
    """The last phase: re-warm, then decay to a floor, on a better mix with some replay."""

    parent: str = semantic("pretrain")
    seed: Optional[int] = semantic(None)
    tokens: Any = semantic(MISSING)
    batch_tokens: Any = semantic(None)  # null = the parent's
    mix: Optional[Mix] = semantic(None)  # what is not replay; null = the root's mix
    replay: Replay = semantic(factory=lambda: Replay(fraction=0.6))
    warmup_tokens: Any = semantic(0)  # linear from 0 to peak_fraction; rounded up to whole steps
    peak_fraction: float = semantic(0.75)  # of the parent phase's peak LR
    shape: str = semantic("linear")  # constant | linear | cosine | exponential | one_minus_sqrt
    floor_fraction: float = semantic(0.0)  # the last LR as a fraction of the parent phase's peak LR
    optimizer_state: str = semantic("carry")


@dataclass(kw_only=True)
class Optim:
    """AdamW; matrices decay, embeddings, norms and vectors do not."""

    kind: str = semantic("adamw")
    betas: tuple[float, float] = semantic((0.9, 0.95))
    eps: float = semantic(1e-8)
    weight_decay: float = semantic(0.1)
    clip: float = semantic(1.0)  # global gradient norm; 0 = no clipping


@dataclass(kw_only=True)
class Parallelism:
    """How a stage uses the machine."""

    threads: int = execution(1)  # CPU threads of one process; part of the numerics fingerprint, never derived
    nodes: int = execution(1)  # machines that the processes of one training are spread over, evenly
    data: int = execution(1)  # copies of the model over all nodes, a process (rank) each: an equal share of every batch
    timeout_seconds: float = execution(600.0)  # ranks wait for each other so long; more than writing a state takes
    # none | full: layers keep their inputs alone, the rest is computed again | auto: full on a GPU that is too small for none
    activation_checkpointing: str = execution("auto")
    # Layouts that `zexp calc` counts; a training does without.
    zero: int = execution(0)  # what the copies share out: 0 nothing | 1 optimizer | 2 and gradients | 3 and weights
    tensor: int = execution(1)  # devices that share the matrices of one copy
    expert: int = execution(1)  # of the copies, how many share one set of experts


@dataclass(kw_only=True)
class Kernels:
    """Which backend an operation takes."""

    backend: str = execution("auto")  # auto | torch | fused


@dataclass(kw_only=True)
class Eval:
    """Which tasks score a state."""

    tasks: list[str] = semantic(factory=list)  # names: a YAML in ./evals, zexp's evals/, lm-eval's own; `bpb` = one per source
    context_tokens: Optional[int] = semantic(None)  # a model sees at most so many; null = seq_len
    limit: Optional[int] = semantic(None)  # only the first n documents of each task; null = all
    batch_size: int = execution(16)  # sequences at once; scores do not depend on it


@dataclass(kw_only=True)
class Logger:
    """Curves beside the JSONL that is always written."""

    kind: str = execution("jsonl")  # jsonl | wandb
    project: Optional[str] = execution(None)
    entity: Optional[str] = execution(None)


@dataclass(kw_only=True)
class Keep:
    """Which states stay, beside every fork point, trunk end and end that a study names."""

    rolling: int = execution(2)  # newest states that are only there to resume from
    ladder: bool = execution(True)  # also 1, 2, 5 · 10^k steps and each 10 % of the target
    ends: str = execution("weights")  # what stays of an end that nobody forks, once it is scored: weights | all


@dataclass(kw_only=True)
class Checkpoint:
    """When states are written and which stay."""

    every_seconds: float = execution(120.0)  # between rolling states, for resuming
    keep: Keep = execution(factory=Keep)


@dataclass(kw_only=True)
class Divergence:
    """When a training counts as diverged, beside a loss that is not finite."""

    margin: float = execution(2.0)  # nats a token above ln V, the loss of the uniform guess
    steps: int = execution(20)  # that many consecutive optimizer steps


@dataclass(kw_only=True)
class Execution:
    """Speed and place; nothing here changes a result."""

    micro_batch: int = execution(4)  # sequences per forward pass
    device: str = execution("auto")  # auto (a GPU where there is one) | cpu | cuda
    device_model: Optional[str] = execution(None)  # what plan reckons with (zexp/calc/devices.py: h100, …); null = this machine's
    deterministic: bool = execution(True)  # deterministic algorithms: same fingerprint, same bits
    log_every: int = execution(10)  # optimizer steps
    divergence: Divergence = execution(factory=Divergence)
    retry_diverged: bool = execution(False)  # train a diverged stage again


@dataclass(kw_only=True)
class Seeds:
    """Seeds by purpose."""

    init: Optional[int] = semantic(None)  # initial weights; null = the root's seed


@dataclass(kw_only=True)
class Init:
    """Where the initial weights come from, if they are not drawn."""

    from_hf: Optional[str] = semantic(None)  # a folder of `transformers`' with the model that arch describes; counts by content


@dataclass(kw_only=True)
class Study:
    """A question and the variants that answer it. Everything here selects or names; the variants carry the identity."""

    name: Optional[str] = execution(None)  # null = the sweep file's name, or made from the overrides
    question: Optional[str] = execution(None)
    grid: dict[str, Any] = execution(factory=dict)  # key -> list of values
    zip: dict[str, Any] = execution(factory=dict)  # key -> list of values, all of one length, walked together
    arms: dict[str, list[str]] = execution(factory=dict)  # name -> overrides
    seeds: Optional[list[int]] = execution(None)  # null = the root's seed alone
    exclude: list[dict[str, Any]] = execution(factory=list)  # axes' values whose combination is left out
    baseline: dict[str, Any] = execution(factory=dict)  # axis -> value that the others are compared with
    metric: Optional[str] = execution(None)  # task/metric that ranks
    scales: dict[str, list[str]] = execution(factory=dict)  # scale -> overrides applied before grid and arms


@dataclass(kw_only=True)
class Run:
    """One variant, or a study of many."""

    study: Study = execution(factory=Study)
    seed: int = semantic(0)  # default of seeds.init and of every phase's seed
    seeds: Seeds = semantic(factory=Seeds)
    init: Init = semantic(factory=Init, absent=Init())
    seq_len: int = semantic(256)  # labels of one sequence
    precision: str = semantic("fp32")  # fp32 | bf16 (autocast, fp32 weights)
    store: str = execution("store")  # folder of all results
    detach: bool = execution(False)  # the command returns at once; local: a process in the background goes on, slurm: the jobs do
    scale: str = execution("tiny")  # the name of the scale that was applied
    arch: Arch = semantic(factory=Arch)
    corpus: Corpus = semantic(factory=Corpus)
    mix: Mix = semantic(factory=Mix)
    schedule: Schedule = semantic(factory=Schedule)
    phases: dict[str, Phase] = semantic(factory=dict)
    anneal: Optional[Anneal] = semantic(None)
    optim: Optim = semantic(factory=Optim)
    parallelism: Parallelism = execution(factory=Parallelism)
    kernels: Kernels = execution(factory=Kernels)
    eval: Eval = semantic(factory=Eval)
    logger: Logger = execution(factory=Logger)
    checkpoint: Checkpoint = execution(factory=Checkpoint)
    execution: Execution = execution(factory=Execution)


def schemas() -> list[type]:
    """Every dataclass of the schema, for the test that each field is declared."""
    return [
        Norm, Parallel, Arch, Source, MixSource, Mix, Tokenizer, Packing, Corpus, Schedule, Phase, Replay, Anneal, Optim,
        Parallelism, Kernels, Eval, Logger, Keep, Checkpoint, Divergence, Execution, Seeds, Init, Study, Run,
    ]  # fmt: skip
