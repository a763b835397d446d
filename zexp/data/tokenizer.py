"""Tokenizers, by the `tokenizers` library: byte-level BPE trained on a bounded sample of the training text, or published."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from zexp.data import documents, published
from zexp.data.mix import PARTS
from zexp.store import files
from zexp.store.attempt import Attempt
from zexp.store.errors import StoreError
from zexp.store.folder import StageFolder, Store

EOD = "<|eod|>"  # of those that are trained here
EOD_ID = 0
INFO = "info.json"


def run(store: Store, folder: StageFolder, request: dict[str, Any], attempt: Attempt) -> str:
    """The stage: result/tokenizer.json and result/info.json {vocab_size, used, eod_id, sample_bytes}.

    Of a published tokenizer, the files that are beside it as well, and no sample_bytes.
    request: directory, what relative file names are relative to (default: the working directory); tokenizer, the folder
    of a published one.
    """
    semantic = folder.semantic()
    one_thread()
    if semantic["kind"] == "hf":
        return _copy(semantic, request, attempt)
    counted = {"bytes": 0}

    def texts() -> Iterator[str]:
        for entry in semantic["sources"]:
            size = semantic["sample_bytes"] * entry["weight"] // PARTS
            sampled = documents.sample(
                entry["source"],
                semantic["split"]["heldout"],
                size,
                directory=Path(request.get("directory", ".")),
                cache=store.cache,
            )
            for text in sampled:
                counted["bytes"] += len(text.encode())
                attempt.progress(min(counted["bytes"], semantic["sample_bytes"]), semantic["sample_bytes"], "bytes")
                attempt.check()
                yield text

    tokenizer = train(texts(), semantic["vocab_size"])
    scratch = attempt.scratch("tokenizer")
    files.write_atomic(scratch / "tokenizer.json", tokenizer.to_str())
    info = {
        "vocab_size": semantic["vocab_size"],
        "used": tokenizer.get_vocab_size(),  # fewer where the text has not enough pairs to merge
        "eod_id": EOD_ID,
        "sample_bytes": counted["bytes"],
    }
    files.write_json(scratch / INFO, info)
    attempt.publish(scratch, "result")
    return "done"


def _copy(semantic: dict[str, Any], request: dict[str, Any], attempt: Attempt) -> str:
    scratch = attempt.scratch("tokenizer")
    source = Path(request.get("directory", "."), Path(request["tokenizer"]).expanduser())
    published.copy(source, semantic["files"], scratch)
    tokenizer = _plain(Tokenizer.from_file(str(scratch / published.TOKENIZER)))
    if vocab_size(tokenizer) != semantic["vocab_size"]:
        raise StoreError(f"{source}: {vocab_size(tokenizer)} token ids, and the plan counted {semantic['vocab_size']} in its JSON.")
    info = {key: semantic[key] for key in ("vocab_size", "eod_id")} | {"used": tokenizer.get_vocab_size()}
    files.write_json(scratch / INFO, info)
    attempt.publish(scratch, "result")
    return "done"


def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most vocab_size tokens: <|eod|> is 0, then the 256 bytes, then merges.

    The same texts give the same tokenizer, in any order of the texts: ties between pairs are broken by their ids.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _plain(tokenizer)


def load(store: Store, id_: str) -> Tokenizer:
    """A tokenizer that was built; StoreError if it was not."""
    return _plain(Tokenizer.from_file(str(store.folder("tokenizer", id_).required() / "tokenizer.json")))


def eod_id(store: Store, id_: str) -> int:
    """The id of the token that begins and ends documents; StoreError if the tokenizer was not built."""
    return int(files.read_json(store.folder("tokenizer", id_).required() / INFO)["eod_id"])


def exported(store: Store, id_: str, seq_len: int) -> dict[str, bytes]:
    """File names and contents of a tokenizer as AutoTokenizer of `transformers` loads it; StoreError if it was not built.

    Its bos_token and its eos_token are the token that began and ended documents in training, whatever a published one
    called them. One trained here puts it nowhere by itself.
    """
    result = store.folder("tokenizer", id_).required()
    eod = load(store, id_).id_to_token(eod_id(store, id_))
    assert eod is not None, "the plan found it in the vocabulary"
    found = {name: (result / name).read_bytes() for name in published.files_of(result)}
    found |= {name: published.with_ends(found[name], eod) for name in published.BESIDE if name in found}
    if "tokenizer_config.json" not in found:
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": eod,
            "eos_token": eod,
            "model_max_length": seq_len,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # "<|eod|>" that stands in a text is seven characters, as in training
        }
        found["tokenizer_config.json"] = (json.dumps(config, indent=1) + "\n").encode()
    return found


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the highest token id (ids of published tokenizers may have gaps)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without eod. Not encode_batch: its offsets, which nobody reads, cost half of the time."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def one_thread() -> None:
    """Before the first encoding of a process: stages share the machine's cores, and a pool does not survive a fork."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """'<|eod|>' that stands in a text is seven characters like any others; only the corpus puts the token itself.

    Documents are neither cut off nor filled up, whatever a published tokenizer says.
    """
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
