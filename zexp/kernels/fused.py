"""What the adapters of fused kernels share.

An adapter makes a package's kernel take the operation's own arguments: layout, dtypes, and document boundaries as the package
wants them. It says which calls the kernel cannot take; the torch backend computes those.

B batch · T positions.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from zexp.kernels.documents import Documents

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
OFFSETS = 1 << 31  # of what 32-bit offsets reach


@dataclass(frozen=True)
class Fused:
    """One function of an operation by a fused kernel.

    run: takes the arguments of the torch backend's function, and returns what that returns.
    refuses: takes the same; why the kernel cannot take this call, None = it can.
    """

    run: Callable[..., Any]
    refuses: Callable[..., str | None]


def not_sixteen_bit(*tensors: Tensor) -> str | None:
    """Kernels that multiply fp32 matrices do it in TF32, which is not what precision=fp32 promises: torch takes those."""
    other = next((tensor.dtype for tensor in tensors if tensor.dtype not in SIXTEEN_BIT), None)
    return None if other is None else f"inputs in {str(other).removeprefix('torch.')}, the kernel multiplies 16-bit numbers"


def extent(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 0)


def ends_of(documents: Documents | None, like_BT: Tensor) -> tuple[Tensor, int]:
    """Documents.ends; without documents each row is one."""
    if documents is not None:
        return documents.ends()
    batch, length = like_BT.shape[:2]
    return _ends_of_rows(batch, length, like_BT.device), length


@lru_cache(maxsize=8)
def _ends_of_rows(batch: int, length: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # evaluation may be what makes it, and training what keeps it for a backward pass
        return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)


def one_row(documents: Documents | None, *tensors: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """(B, T, …) tensors and the boundaries as flash-linear-attention takes them: packed ones as one row of all."""
    if documents is None:
        return list(tensors), None
    ends, _ = documents.ends()
    return [tensor.flatten(0, 1)[None] for tensor in tensors], documents.once("ends int64", lambda: ends.long())


def without_init(package: str, extension: str) -> ModuleType | None:
    """Opens a package without running its __init__, where that would import a compiled extension which is not there.

    mamba-ssm's Triton kernels need no compiler, but its __init__ imports the CUDA extension of Mamba-1. None = nothing to do.
    """
    if package in sys.modules or find_spec(extension) is not None:
        return None
    spec = find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"{package} is not installed")
    module = ModuleType(package)
    module.__path__ = list(spec.submodule_search_locations)
    module.__spec__ = spec
    sys.modules[package] = module
    return module


def adapter(operation: str, name: str) -> dict[str, Fused]:
    """The functions of an operation by the backend whose adapter has that name. Raises what importing its package raises.

    Triton is told to keep on disk which configuration of a kernel was the fastest: else each process would time them
    again, and two could take different ones, whose sums differ in the last bits.
    """
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    made: dict[str, Fused] = getattr(adapters_of(operation, name), name)()
    return made


def adapters_of(operation: str, name: str) -> ModuleType:
    """The module with the adapter of that name."""
    return importlib.import_module(f"zexp.kernels.{operation}.{'cpp' if name == 'cpp' else 'fused'}_backend")
