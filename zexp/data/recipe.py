"""The identity of sources, tokenizers, corpora and packings, at plan time: recipes and fingerprints, nothing built.

Imports neither torch nor tokenizers; with a warm cache the embedded sources' 1,600 files cost about 0.1 s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zexp.config.errors import ConfigError
from zexp.config.tokens import parse_tokens
from zexp.data import docstrings, embedded, local, published
from zexp.data.mix import quantise
from zexp.store.fingerprint import DigestCache
from zexp.store.ids import round12

NUMERICS = {"data.tokenizer": 1, "data.corpus": 1, "data.packing": 1}
READS = {  # which of Source's keys a kind reads, besides kind and max_bytes
    "embedded": ("view", "packages"),
    "text": ("files", "documents"),
    "jsonl": ("files", "text_key"),
    "parquet": ("files", "text_key"),
}
STRATEGIES = ("concat",)
# The blocks below are written by hand. A key that one of them gets later stands here with its `absent` value, the one
# that means "as before" (zexp.config.identity): `as_hashed` leaves it out while it equals that, so older ids stay, and
# what reads it reads `as_meant`. The default in the schema may change freely; a value here never.
ABSENT: dict[str, dict[str, Any]] = {
    "source": {"max_bytes": None},
    "split": {},
    "tokenizer": {},
    "corpus": {},
    "packing": {},
}
SMALLEST_VOCAB = 257  # the 256 bytes and <|eod|>


def as_hashed(block: str, keys: dict[str, Any]) -> dict[str, Any]:
    """A block without the keys that equal their absent value. block: a name in ABSENT."""
    absent = ABSENT[block]
    return {key: value for key, value in keys.items() if key not in absent or value != absent[key]}


def as_meant(block: str, semantic: dict[str, Any]) -> dict[str, Any]:
    """A block as read back, with the absent value of every key that it lacks."""
    return ABSENT[block] | semantic


def source_semantic(
    name: str, source: dict[str, Any], *, store_root: Path, directory: Path, key: str | None = None
) -> dict[str, Any]:
    """A source's recipe with the fingerprint of its files.

    source: Source's keys. directory: what relative paths are relative to. key: what to call it in an error.
    Raises ConfigError: an unknown kind, keys that the kind does not read, and what its files have wrong.
    """
    key = key or f"corpus.sources.{name}"
    kind = source.get("kind")
    if kind not in READS:
        raise ConfigError(f"{key}.kind = {kind!r}: a source is {', '.join(READS)}. Set one of these.")
    unread = [k for reads in READS.values() for k in reads if k not in READS[kind] and source.get(k) is not None]
    if unread:
        raise ConfigError(
            f"{key}.{k} is set, but a source of kind {kind} does not read it (it reads {', '.join(READS[kind])}). "
            "Take it out."
            for k in dict.fromkeys(unread)
        )
    cache = Path(store_root) / "cache"
    if kind == "embedded":
        made = embedded.semantic(source.get("view"), source.get("packages"), DigestCache(cache / "files.json"), key)
    else:
        made = local.semantic(source, Path(directory), cache, key)
    bound = source.get("max_bytes")
    made["max_bytes"] = None if bound is None else parse_tokens(bound, f"{key}.max_bytes")
    if made["max_bytes"] == 0:
        raise ConfigError(f"{key}.max_bytes is 0, which leaves nothing. Give a number, or null for all.")
    return as_hashed("source", made)


def vocab_size(tokenizer: dict[str, Any], directory: Path) -> int:
    """Token ids that a corpus' tokenizer can give, at most. tokenizer: its keys. Raises ConfigError for one that is not there."""
    return published.vocab_size(tokenizer, directory) if tokenizer["kind"] == "hf" else int(tokenizer["vocab_size"])


def tokenizer_semantic(
    corpus: dict[str, Any],
    sources: dict[str, dict[str, Any]],
    *,
    store_root: Path | None = None,
    directory: Path = Path(),
) -> dict[str, Any]:
    """The semantic block of the tokenizer that a corpus config asks for.

    corpus: the keys of Corpus. sources: the semantic blocks of corpus.sources, by name. store_root: for the cache of file
    digests. directory: what relative paths are relative to.
    """
    config = corpus["tokenizer"]
    if config["kind"] == "hf":
        cache = DigestCache(None if store_root is None else store_root / "cache" / "files.json")
        return as_hashed("tokenizer", published.semantic(config, directory, cache))
    problems = []
    if config["kind"] != "bpe":
        problems.append(f"corpus.tokenizer.kind = {config['kind']!r}: there are bpe and hf. Set one.")
    problems += [
        f"corpus.tokenizer.{key} is set, but kind: bpe does not read it. Set it to null, or kind: hf."
        for key in ("path", "eod")
        if config.get(key) is not None
    ]
    if config["vocab_size"] < SMALLEST_VOCAB:
        problems.append(
            f"corpus.tokenizer.vocab_size = {config['vocab_size']}: a byte-level BPE needs at least {SMALLEST_VOCAB}, "
            "the 256 bytes and <|eod|>."
        )
    if not sources:
        problems.append("corpus.sources is empty: a tokenizer needs text. Name a source.")
    weights = config.get("weights")
    for name in weights or {}:
        if name not in sources:
            problems.append(
                f"corpus.tokenizer.weights.{name}: no such source in corpus.sources; there is {', '.join(sources)}."
            )
    if problems:
        raise ConfigError(problems)
    # In the order of names: which source comes first must not matter.
    shares = dict.fromkeys(sorted(sources), 1.0) if weights is None else dict(sorted(weights.items()))
    parts = quantise(list(shares.values()), [f"corpus.tokenizer.weights.{name}" for name in shares])
    sample_bytes = parse_tokens(config["sample_bytes"], "corpus.tokenizer.sample_bytes")
    if sample_bytes == 0:
        raise ConfigError("corpus.tokenizer.sample_bytes is 0: a tokenizer needs text, e.g. 3M.")
    used: list[dict[str, Any]] = [
        {"source": _unbounded(sources[name]), "weight": part}
        for name, part in zip(shares, parts, strict=True)
        if part > 0
    ]
    made = {
        "kind": "bpe",
        "vocab_size": config["vocab_size"],
        "sample_bytes": sample_bytes,
        "sources": used,
        "split": split(corpus),
        "numerics": {
            "data.tokenizer": NUMERICS["data.tokenizer"],
            **{k: v for one in used for k, v in source_numerics(one["source"]).items()},
        },
    }
    return as_hashed("tokenizer", made)


def corpus_semantic(corpus: dict[str, Any], source: dict[str, Any], tokenizer_id: str) -> dict[str, Any]:
    """The semantic block of one source's corpus."""
    made = {
        "source": source,
        "split": split(corpus),
        "seed": corpus["seed"],
        "tokenizer": tokenizer_id,
        "numerics": {"data.corpus": NUMERICS["data.corpus"], **source_numerics(source)},
    }
    return as_hashed("corpus", made)


def packing_semantic(corpus: dict[str, Any], corpus_id: str, seq_len: int) -> dict[str, Any]:
    """The semantic block of one corpus cut into windows of seq_len labels."""
    problems = []
    strategy = corpus["packing"]["strategy"]
    if strategy not in STRATEGIES:
        problems.append(f"corpus.packing.strategy = {strategy!r}: there is {', '.join(STRATEGIES)}. Set it.")
    if isinstance(seq_len, bool) or not isinstance(seq_len, int) or seq_len < 1:
        problems.append(f"seq_len = {seq_len!r}: a sequence has a whole number of tokens, at least 1.")
    if problems:
        raise ConfigError(problems)
    made = {
        "corpus": corpus_id,
        "seq_len": seq_len,
        "strategy": strategy,
        "numerics": {"data.packing": NUMERICS["data.packing"]},
    }
    return as_hashed("packing", made)


def split(corpus: dict[str, Any]) -> dict[str, Any]:
    """Which share is held out; ConfigError if it is no share."""
    heldout = corpus["heldout"]
    if isinstance(heldout, bool) or not isinstance(heldout, int | float) or not 0 <= heldout < 1:
        raise ConfigError(f"corpus.heldout = {heldout!r}: a share of at least 0 and below 1, e.g. 0.05.")
    return as_hashed("split", {"heldout": round12(float(heldout))})


def source_numerics(source: dict[str, Any]) -> dict[str, int]:
    """The numerics numbers of how a source is read."""
    if source["kind"] == "embedded":
        return {**embedded.NUMERICS, **docstrings.NUMERICS}
    return dict(local.NUMERICS)


def tokens_bound(source: dict[str, Any]) -> int:
    """More tokens than a source's corpus can have: every token is at least one byte, and each document adds an eod."""
    if source["kind"] == "embedded":
        # A docstring's quotes and indentation are more bytes than the eod and the line end that it gets; a module's
        # gets an `import` line as well, which is about its file's name.
        bound: int = source["files"]["bytes"] + 200 * source["files"]["files"]
    else:
        bound = source["counts"]["bytes"] + source["counts"]["documents"]
    most = as_meant("source", source)["max_bytes"]
    return bound if most is None else min(bound, 2 * int(most))  # a document has at least one byte


def _unbounded(source: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer samples the whole source: bounding its corpus leaves the tokenizer as it is."""
    return {key: value for key, value in source.items() if key != "max_bytes"}
