"""A model as a folder of files that other tools load. `transformers` is not needed to write it.

--hf:           config.json, generation_config.json, model.safetensors (or several and their index), the tokenizer
--safetensors:  model.safetensors under zexp's names, model.json (the model's semantic block), the tokenizer
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from zexp.model.hf.convert import parted
from zexp.model.hf.family import Family, Parts
from zexp.model.hf.folder import INDEX, WEIGHTS, check_target
from zexp.model.hf.pieces import Piece
from zexp.store import files

SHARD_BYTES = 5_000_000_000  # of one file of weights, as in `transformers`
FP32 = 4  # bytes


def write_hf(
    target: Path,
    family: Family,
    semantic: Mapping[str, Any],
    ours: Mapping[str, Tensor],
    *,
    positions: int,
    eod_id: int,
    tokenizer: Mapping[str, bytes],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a new folder that AutoModelForCausalLM and AutoTokenizer load. It appears whole or not at all.

    ours: the weights by our names. positions: the sequence length that the model was trained with. eod_id: the token that
    begins and ends documents. tokenizer: file names and contents. Raises ConfigError if target is there.
    """
    ends = {"bos_token_id": eod_id, "eos_token_id": eod_id, "pad_token_id": None}
    config = {
        **family.config(semantic),
        **ends,
        "dtype": "float32",
        "max_position_embeddings": positions,
        "use_cache": True,
    }
    with _appearing(target) as folder:
        files.write_json(folder / "config.json", config)
        files.write_json(folder / "generation_config.json", {"_from_model_config": True, **ends})
        _write_weights(folder, list(family.tensors(Parts(semantic))), ours, shard_bytes)
        for name, content in tokenizer.items():
            files.write_atomic(folder / name, content)


def write_safetensors(
    target: Path, facts: Mapping[str, Any], ours: Mapping[str, Tensor], *, tokenizer: Mapping[str, bytes]
) -> None:
    """Write a new folder with the weights under our names. facts: model.json. Raises ConfigError if target is there."""
    with _appearing(target) as folder:
        files.write_json(folder / "model.json", dict(facts))
        save_file({name: one.contiguous() for name, one in ours.items()}, folder / WEIGHTS, {"format": "pt"})
        for name, content in tokenizer.items():
            files.write_atomic(folder / name, content)


def _write_weights(folder: Path, pieces: list[Piece], ours: Mapping[str, Tensor], shard_bytes: int) -> None:
    shards = list(_shards(pieces, shard_bytes))
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: tensor for piece in shard for name, tensor in parted(piece, ours[piece.ours])}
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = sum(map(_bytes, pieces))
        files.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))})


def _shards(pieces: Iterable[Piece], most: int) -> Iterator[list[Piece]]:
    """Pieces in order, together at most so many bytes, or one alone."""
    shard: list[Piece] = []
    size = 0
    for piece in pieces:
        if shard and size + _bytes(piece) > most:
            yield shard
            shard, size = [], 0
        shard.append(piece)
        size += _bytes(piece)
    yield shard


def _bytes(piece: Piece) -> int:
    return FP32 * sum(math.prod(theirs.shape) for theirs in piece.theirs)


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A new folder beside the target, renamed to it at the end; removed if anything goes wrong."""
    check_target(target)
    scratch = target.absolute().parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    scratch.mkdir()
    try:
        yield scratch
        files.sync_tree(scratch)
        if os.path.lexists(target):  # made meanwhile; a rename would replace an empty folder
            check_target(target)
        os.rename(scratch, target)
        files.sync_folder(target.absolute().parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
