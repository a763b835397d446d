"""Runs real Triton kernels on a CPU, by Triton's interpreter, through zexp's adapters, against the references.

    python -m tests.kernels.interpreted OPERATION BACKEND          needs TRITON_INTERPRET=1

In fp32: what the interpreter makes of bf16 products is noise. Prints one JSON object: the largest errors of values and gradients.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner

from zexp.kernels import samples, selfcheck
from zexp.kernels.fused import adapter

# The interpreter has no device to select or to ask, and a choice of configurations would time them all.
torch.cuda.device = lambda *args: nullcontext()  # type: ignore[misc,assignment]
torch.cuda.get_device_properties = lambda *args: SimpleNamespace(multi_processor_count=4)  # type: ignore[assignment]


def _first(self, *args, **options):
    config = self.best_config = self.configs[0]
    options = {**options, **config.all_kwargs()}
    if config.pre_hook is not None:  # zeroes what the kernel adds to
        config.pre_hook({**dict(zip(self.arg_names, args, strict=False)), **options})
    return self.fn.run(*args, **options)


Autotuner.run = _first

# On a device a kernel's float argument is a tensor; the interpreter hands it on as Python's.
_converted = interpreter._implicit_cvt


def _with_floats(argument):
    if isinstance(argument, float):
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
    return _converted(argument)


interpreter._implicit_cvt = _with_floats

for library in (libdevice, cuda_libdevice):  # a device's library, of which the interpreter has nothing
    library.rsqrt = lambda x: 1 / tl.sqrt(x)
    library.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1


class Count(int):
    """A loop's number, which in a compiled kernel is a tensor."""

    def to(self, dtype, *args, **options):
        return _converted(int(self)).to(dtype)


def _counting(package: str) -> None:
    """Loops over a range in the package's modules count in such numbers."""
    for name, module in list(sys.modules.items()):
        if name.startswith(package) and module is not None:
            module.range = lambda *of: (Count(number) for number in range(*of))  # type: ignore[attr-defined]


def main(operation: str, backend: str) -> None:
    torch.set_num_threads(1)
    values, gradients = [], []
    functions = adapter(operation, backend)
    _counting("fla.ops")
    _counting("mamba_ssm.ops")
    for name, fused in functions.items():
        for number, size in enumerate(samples.CHECKED[name]):
            one = samples.sample(name, size, seed=number)
            given = one.given("cpu", torch.float32)
            error = selfcheck.compared(name, fused.run, one, given, "cpu")
            values.append(error.value)
            gradients.append(error.gradient)
    print(json.dumps({"value": max(values), "gradient": max(gradients)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
