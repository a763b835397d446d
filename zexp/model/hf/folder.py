"""A folder with a `transformers` checkpoint, as far as a plan needs it: config.json and the headers of the weights.

No torch: a safetensors file begins with the length of its header (8 bytes, little-endian) and the header as JSON.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zexp.config.errors import ConfigError
from zexp.model.hf.family import NUMERICS, Family, Parts
from zexp.model.hf.pieces import Piece, Shape
from zexp.model.hf.table import family_for
from zexp.store.fingerprint import DigestCache, file_fingerprint

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")  # of numbers that become fp32
LARGEST_HEADER = 100_000_000  # bytes, the format's own bound
NAMED = 8  # tensors of one kind in a message


@dataclass(frozen=True)
class Stored:
    """A tensor of a file, by its header."""

    file: Path
    shape: Shape
    dtype: str


@dataclass(frozen=True)
class Folder:
    """config.json, the files that hold the weights, and their tensors by name."""

    path: Path
    config: Mapping[str, Any]
    files: list[Path]
    tensors: dict[str, Stored]

    @property
    def where(self) -> str:
        """What messages call config.json."""
        return str(self.path / "config.json")


def read(path: Path, key: str) -> Folder:
    """A checkpoint's folder. key: what to call it in messages. Raises ConfigError with everything that is missing."""
    if not path.is_dir():
        raise ConfigError(f"{key} = {path}: no such folder. Name one with a config.json and a {WEIGHTS}.")
    config = read_config(path, key)
    if (path / WEIGHTS).is_file():
        files = [path / WEIGHTS]
    elif (path / INDEX).is_file():
        names = sorted(set(_json(path / INDEX).get("weight_map", {}).values()))
        files = [path / name for name in names]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ConfigError(f"{key}: {path / INDEX} names files that are not there: {', '.join(missing)}.")
    else:
        there = ", ".join(sorted(one.name for one in path.iterdir())[:NAMED]) or "nothing"
        raise ConfigError(
            f"{key}: {path} has no {WEIGHTS} and no {INDEX}; there is {there}. "
            "Weights in another format: load them with transformers and save_pretrained() them."
        )
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, facts in _header(file, key).items():
            if name != "__metadata__":
                tensors[name] = Stored(file, tuple(facts["shape"]), facts["dtype"])
    return Folder(path, config, files, tensors)


def read_config(path: Path, key: str) -> dict[str, Any]:
    """config.json alone. Raises ConfigError."""
    if not (path / "config.json").is_file():
        raise ConfigError(f"{key}: {path} has no config.json, which says what model its weights are.")
    return _json(path / "config.json")


def check(folder: Folder, model: Mapping[str, Any], key: str) -> Family:
    """The folder's family, if its weights are those of this model.

    Raises ConfigError with every key of the architecture that config.json contradicts, else with every tensor that is
    missing, surplus or of another shape or kind.
    """
    family = family_for(folder.config, folder.where)
    if found := family.differences(folder.config, model, folder.where):
        raise ConfigError(found)
    if found := tensor_problems(folder, family, list(family.tensors(Parts(model))), key):
        raise ConfigError(found)
    return family


def init_semantic(folder: Folder, family: Family, cache: DigestCache) -> dict[str, Any]:
    """What stands in a root segment for weights out of the folder: {from_hf, numerics}. By content, wherever it lies."""
    found = file_fingerprint(((file.name, file) for file in folder.files), cache)
    return {"from_hf": {"model_type": family.model_type, **found}, "numerics": dict(NUMERICS)}


def tensor_problems(folder: Folder, family: Family, pieces: list[Piece], key: str) -> list[str]:
    """One text for all missing tensors, one for all surplus ones, one for each of another shape or kind of number."""
    problems, missing, expected = [], [], set()
    for piece in pieces:
        for theirs in piece.theirs:
            there = [name for name in (theirs.name, *theirs.also) if name in folder.tensors]
            expected.update(there)
            if not there:
                missing.append(theirs.name)
            for name in there:
                stored = folder.tensors[name]
                if stored.shape != theirs.shape:
                    problems.append(
                        f"{key}: {name} is {list(stored.shape)} in {stored.file.name}; "
                        f"the model needs {list(theirs.shape)}."
                    )
                elif stored.dtype not in DTYPES:
                    problems.append(
                        f"{key}: {name} holds {stored.dtype} in {stored.file.name}; zexp reads {', '.join(DTYPES)}."
                    )
    ignored = re.compile("|".join(family.ignored)) if family.ignored else None
    surplus = [
        name for name in sorted(folder.tensors) if name not in expected and not (ignored and ignored.fullmatch(name))
    ]
    for names, what in ((missing, "lacks"), (surplus, "has tensors that the model has no place for:")):
        if names:
            problems.append(f"{key}: {folder.path} {what} {', '.join(names)}. ({len(names)} of {len(folder.tensors)})")
    return problems


def check_target(target: Path) -> None:
    """Raises ConfigError if a folder that is to be written is there, or cannot be made."""
    if os.path.lexists(target):
        raise ConfigError(f"{target} is there already, and export overwrites nothing. Name another folder.")
    above = target.absolute().parent
    if not above.is_dir():
        raise ConfigError(f"{above}: no such folder to make {target.name} in.")
    if not os.access(above, os.W_OK):
        raise ConfigError(f"{above} cannot be written. Name another folder.")


def _header(file: Path, key: str) -> dict[str, Any]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(size - 8, LARGEST_HEADER):
            raise ConfigError(f"{key}: {file} is no safetensors file, or it is cut off.")
        try:
            header = json.loads(stream.read(length))
            end = max((facts["data_offsets"][1] for name, facts in header.items() if name != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{key}: {file} has no safetensors header: {error}") from error
    if 8 + length + end != size:
        raise ConfigError(
            f"{key}: {file} has {size} bytes, and its header describes {8 + length + end}. "
            "It is cut off; copy it again."
        )
    return dict(header)


def _json(path: Path) -> dict[str, Any]:
    try:
        made = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(made, dict):
        raise ConfigError(f"{path}: a JSON object is expected.")
    return made
