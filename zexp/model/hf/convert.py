"""The pieces' tensors, one way and the other, and whole checkpoints. Nothing is computed: both ways are exact."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from zexp.model.hf.family import Family, Parts
from zexp.model.hf.folder import NAMED, Folder
from zexp.model.hf.pieces import Piece
from zexp.store.errors import StoreError


def joined(piece: Piece, theirs: Iterable[Tensor], shape: torch.Size) -> Tensor:
    """Our tensor from theirs. shape: ours."""
    rows = torch.cat(list(theirs))
    if piece.swapped is not None:
        outer, inner = piece.swapped
        rows = rows.reshape(outer, inner, -1).transpose(0, 1)
    return rows.reshape(shape)


def parted(piece: Piece, ours: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Their tensors, with their names, from ours."""
    if piece.swapped is not None:
        outer, inner = piece.swapped
        ours = ours.reshape(inner, outer, -1).transpose(0, 1)
    flat, start = ours.reshape(-1), 0
    for theirs in piece.theirs:
        size = math.prod(theirs.shape)
        yield theirs.name, flat[start : start + size].reshape(theirs.shape).contiguous()
        start += size
    assert start == flat.numel(), f"{piece.ours}: {start} numbers of {flat.numel()} were given away"


def load(folder: Folder, family: Family, model: nn.Module, semantic: Mapping[str, Any]) -> None:
    """Replace the model's weights by the folder's, in fp32, in place. The folder was checked (folder.check).

    semantic: the model's block. Raises StoreError if tensors that are tied in the model differ in the file, and for NaN
    and infinities, with the tensors that have them: training would end at its first loss and name none.
    """
    ours = model.state_dict()
    broken: list[str] = []
    with ExitStack() as stack, torch.no_grad():
        files = {file: stack.enter_context(safe_open(str(file), "pt")) for file in folder.files}
        for piece in family.tensors(Parts(semantic)):
            parts = [_read(folder, files, (theirs.name, *theirs.also)) for theirs in piece.theirs]
            for theirs, part in zip(piece.theirs, parts, strict=True):
                if bad := part.numel() - int(torch.isfinite(part).sum()):
                    broken.append(f"{theirs.name} ({bad:,} of {part.numel():,})")
            target = ours.pop(piece.ours)
            target.copy_(joined(piece, parts, target.shape))
    if broken:
        more = f" and {len(broken) - NAMED} more tensors" if len(broken) > NAMED else ""
        raise StoreError(
            f"{folder.path}: weights are NaN or infinite in fp32: {', '.join(broken[:NAMED])}{more}. "
            "Nothing can be trained from them; save or download the checkpoint again."
        )
    assert not ours, f"no tensor of a {family.class_name} makes {', '.join(ours)}"


def _read(folder: Folder, files: Mapping[Path, Any], names: tuple[str, ...]) -> Tensor:
    first, *others = [name for name in names if name in folder.tensors]
    tensor: Tensor = files[folder.tensors[first].file].get_tensor(first)
    for name in others:
        if not torch.equal(tensor, files[folder.tensors[name].file].get_tensor(name)):
            raise StoreError(f"{folder.path}: {first} and {name} are one tensor in the model, and differ in the file.")
    return tensor.float()


def named(pieces: Iterable[Piece], ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A whole model's tensors under their names."""
    left = dict(ours)
    for piece in pieces:
        yield from parted(piece, left.pop(piece.ours))
    assert not left, f"nothing of theirs holds {', '.join(left)}"
