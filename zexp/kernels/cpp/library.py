"""Compiles an operation's kernel.cpp with the machine's own compiler, once, and calls its functions.

A compiled library is kept in $XDG_CACHE_HOME/zexp/kernels (or ~/.cache) under a name that its sources, the compiler and the
processor decide, so that machines of one home folder never run each other's. Kernels share torch's threads: both are built on
OpenMP, and what g++ makes calls the runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterable
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from zexp.kernels.cache import folder
from zexp.kernels.cpp.compiler import compiler, flags, identity

log = logging.getLogger(__name__)

SOURCE = "kernel.cpp"
ALONE = 1 << 15  # numbers that one thread has done before a second is awake; what torch's own elementwise operations take

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}

# With the types of their arguments, which are those of the first call: to find and wrap them anew takes longer than a row's norm.
_functions: dict[tuple[str, str, torch.dtype], Callable[..., None]] = {}
_PLAIN = {int, float, bool, type(None)}  # what is handed on as it is; isinstance of a torch class takes three times as long


@functools.cache
def library(operation: str) -> ctypes.CDLL:
    """The compiled kernel.cpp of zexp/kernels/<operation>. Raises RuntimeError with what the compiler said, or OSError."""
    texts = sources(operation)
    name = hashlib.sha256("\0".join((*texts.values(), identity())).encode()).hexdigest()[:16]
    path = folder() / f"{operation}-{name}.so"
    if not path.exists():
        _compile(operation, texts, path)
    return ctypes.CDLL(str(path))


def sources(operation: str) -> dict[str, str]:
    """What the operation's library is compiled from, by name: the headers and its kernel.cpp."""
    headers = sorted((file for file in files("zexp.kernels.cpp").iterdir() if file.name.endswith(".h")), key=lambda file: file.name)
    found = {file.name: file for file in (*headers, files(f"zexp.kernels.{operation}") / SOURCE)}
    return {name: file.read_text(encoding="utf-8") for name, file in found.items()}


def call(
    operation: str, function: str, dtype: torch.dtype, *args: Tensor | int | float | None, numbers: int | None = None
) -> None:
    """Calls `<function>_<f32 or bf16>` with pointers, 64-bit integers and floats, and the number of threads at last.

    numbers: that are computed; of few it is one thread. None = many.
    """
    threads = 1 if numbers is not None and numbers < ALONE else torch.get_num_threads()
    found = _functions.get((operation, function, dtype))
    if found is None:
        found = getattr(library(operation), f"{function}_{SUFFIX[dtype]}")
        found.argtypes = [_type(arg) for arg in (*args, threads)]
        _functions[operation, function, dtype] = found
    found(*[arg if type(arg) in _PLAIN else arg.data_ptr() for arg in args], threads)  # type: ignore[union-attr]


def not_taken(
    *, activations: Iterable[Tensor], whole: Iterable[Tensor | None] = (), taken: Collection[torch.dtype] = (torch.float32,)
) -> str | None:
    """Why no kernel takes a call: activations are all fp32 or all bf16, what is given whole (weights, steps, decays) is fp32.

    taken: dtypes of what is given whole, where the caller makes fp32 of it.
    """
    types = {tensor.dtype for tensor in activations}
    if len(types) > 1 or not types.issubset(SUFFIX):
        return f"inputs in {' and '.join(sorted(str(dtype).removeprefix('torch.') for dtype in types))}, the kernel takes fp32 or bf16"
    for tensor in whole:
        if tensor is not None and tensor.dtype not in taken:
            return f"weights in {str(tensor.dtype).removeprefix('torch.')}, the kernel takes fp32"
    return None


def product_dtype(x: Tensor) -> torch.dtype:
    """What x is multiplied in: autocast's, or its own."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def rows(x: Tensor) -> Tensor:
    """x, or a copy, whose last dimension lies side by side and whose others are one: x.flatten(0, -2) is a view of it."""
    if x.stride(-1) != 1 or any(x.stride(d) != x.stride(d + 1) * x.shape[d + 1] for d in range(x.dim() - 2)):
        return x.contiguous()
    return x


def _type(arg: Tensor | int | float | None) -> type[ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float]:
    if arg is None or isinstance(arg, Tensor):
        return ctypes.c_void_p
    return ctypes.c_float if isinstance(arg, float) else ctypes.c_int64


def _compile(operation: str, texts: dict[str, str], path: Path) -> None:
    found = compiler()
    assert found is not None, "asked for where there is a compiler"
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    # Beside its place, so that the rename is one of a single file system: whoever comes second finds it whole.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{operation}-") as temporary:
        for name, text in texts.items():
            Path(temporary, name).write_text(text, encoding="utf-8")
        made = subprocess.run(
            [found, *flags(), SOURCE, "-o", "kernel.so"], cwd=temporary, capture_output=True, text=True
        )
        if made.returncode:
            raise RuntimeError(f"{found} cannot compile {operation}'s {SOURCE}: {made.stderr.strip()}")
        os.replace(Path(temporary, "kernel.so"), path)
    log.info("Kernels: compiled %s with %s in %.1f s.", operation, found, time.monotonic() - began)
