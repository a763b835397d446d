"""The functions that a model calls, each on the backend that was chosen for it.

Modules call `self.kernels.ssd(...)`; `zexp.model.build` gives them the Kernels of their device. Without it they have TORCH.
Decoding calls functions that go on from a state (`self.kernels.ssd_continue(...)`). A step of one token is no work for a kernel over
a sequence: on a CPU zexp/kernels/decode has kernels for it, elsewhere the torch backends' own functions take it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from zexp.kernels import select
from zexp.kernels.activation.torch_backend import gated, mlp_activation
from zexp.kernels.attention.torch_backend import attention
from zexp.kernels.causal_conv1d.torch_backend import causal_conv1d, causal_conv1d_continue
from zexp.kernels.cpp.compiler import compiler, identity
from zexp.kernels.cross_entropy.torch_backend import linear_cross_entropy
from zexp.kernels.decode.torch_backend import linear, mamba2_continue
from zexp.kernels.fused import Fused, adapter
from zexp.kernels.gated_delta.torch_backend import gated_delta
from zexp.kernels.gated_norm.torch_backend import gated_norm, norm_gated
from zexp.kernels.moe.torch_backend import moe
from zexp.kernels.retention.torch_backend import retention
from zexp.kernels.rms_norm.torch_backend import rms_norm
from zexp.kernels.rotary.torch_backend import rotary
from zexp.kernels.select import Choice, Machine
from zexp.kernels.selective_scan.torch_backend import selective_scan
from zexp.kernels.ssd.torch_backend import ssd, ssd_continue
from zexp.kernels.wkv7.torch_backend import wkv7

log = logging.getLogger(__name__)

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Kernels:
    """A function for each, with the arguments of the torch backend's."""

    attention: Function = attention
    attention_continue: Function = attention
    causal_conv1d: Function = causal_conv1d
    causal_conv1d_continue: Callable[..., Any] = causal_conv1d_continue
    gated: Function = gated
    gated_delta: Function = gated_delta
    gated_norm: Function = gated_norm
    linear: Function = linear
    linear_cross_entropy: Function = linear_cross_entropy
    mamba2_continue: Function = mamba2_continue
    mlp_activation: Function = mlp_activation
    moe: Function = moe
    norm_gated: Function = norm_gated
    retention: Function = retention
    rms_norm: Function = rms_norm
    rotary: Function = rotary
    selective_scan: Function = selective_scan
    ssd: Function = ssd
    ssd_continue: Callable[..., Any] = ssd_continue
    wkv7: Function = wkv7


TORCH = Kernels()

# What decoding calls besides, and whose choice it follows. None has a gradient that it does not get from torch, and a training gets
# torch's product of `linear`: a fingerprint does not know of them.
DECODING: dict[str, tuple[str, ...]] = {
    "attention_continue": ("attention",),
    "causal_conv1d_continue": ("causal_conv1d",),
    "linear": (),
    "mamba2_continue": ("causal_conv1d", "ssd", "gated_norm"),
    "ssd_continue": ("ssd",),
}

# Of an operation, where they are not the one of its name.
_FUNCTIONS = {"activation": ("mlp_activation", "gated"), "cross_entropy": ("linear_cross_entropy",), "gated_norm": ("gated_norm", "norm_gated")}


def functions_of(operation: str) -> tuple[str, ...]:
    """The names of the functions of an operation that has fused backends."""
    return _FUNCTIONS.get(operation, (operation,))


class OnBackend:
    """A function on a fused backend, and on torch for the calls that the backend refuses, which is logged once a reason."""

    def __init__(self, name: str, backend: str, fused: Fused, torch_function: Function, device_type: str = "cuda"):
        self.name, self.backend, self.device_type = name, backend, device_type
        self.fused, self.torch_function = fused, torch_function
        self._said: set[str] = set()

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        why = self._against(*args, **options)
        if why is None:
            return self.fused.run(*args, **options)  # type: ignore[no-any-return]
        if why not in self._said:
            self._said.add(why)
            log.info("%s: torch instead of %s where there are %s.", self.name, self.backend, why)
        return self.torch_function(*args, **options)

    def _against(self, *args: Any, **options: Any) -> str | None:
        device = args[0].device.type
        return f"tensors on {device}" if device != self.device_type else self.fused.refuses(*args, **options)


def chosen(kernels: str, operations: Iterable[str], device: str | torch.device, *, deterministic: bool) -> dict[str, Choice]:
    """The backend of each operation on a device. deterministic: whether repeats must give the same bits.

    The first call for a GPU runs the self-check of what it might take. Raises ConfigError as zexp.kernels.select.choose.
    """
    from zexp.kernels.selfcheck import failing

    where = torch.device(device)
    return select.choose(
        kernels,
        operations,
        machine(where),
        deterministic=deterministic,
        failing=lambda operation, backend: failing(operation, backend, where),
    )


def kernels_of(choices: dict[str, Choice]) -> Kernels:
    """The functions of what was chosen."""
    replaced: dict[str, Function] = {}
    for operation, choice in choices.items():
        if choice.backend is None:
            continue
        for name, fused in adapter(operation, choice.backend.adapter()).items():
            replaced[name] = OnBackend(name, choice.name, fused, getattr(TORCH, name), choice.backend.device)
    return replace(TORCH, **replaced) if replaced else TORCH


def decoding(kernels: Kernels, choices: dict[str, Choice], device: str | torch.device) -> Kernels:
    """The same with the functions of zexp/kernels/decode where they can be had: on a CPU with a compiler."""
    if torch.device(device).type != "cpu" or compiler() is None:
        return kernels
    from zexp.kernels.decode import cpp_backend

    taken = [name for name, operations in DECODING.items() if all(_in_cpp(choices.get(operation)) for operation in operations)]
    functions: dict[str, Any] = {name: getattr(cpp_backend, name) for name in taken}
    return replace(kernels, **functions)


def _in_cpp(choice: Choice | None) -> bool:
    return choice is not None and choice.backend == select.CPP


def use(module: nn.Module, kernels: Kernels) -> None:
    """Gives them to the module and to all inside it that call some."""
    for one in module.modules():
        if isinstance(getattr(type(one), "kernels", None), Kernels):
            one.kernels = kernels  # type: ignore[assignment]


def say(choices: dict[str, Choice]) -> None:
    """Logs which backend each operation got, and what was passed over and why. Of torch alone nothing is said."""
    if not any(choice.backend is not None or choice.passed_over for choice in choices.values()):
        return
    log.info("Kernels: %s.", ", ".join(f"{operation} {choice.name}" for operation, choice in sorted(choices.items())))
    for operation, choice in sorted(choices.items()):
        for name, reason in choice.passed_over:
            log.info("Kernels: %s is not taken for %s: %s.", name, operation, reason)


def machine(device: torch.device | str) -> Machine:
    """Of a device: what backends are chosen by, and what a pass of their self-check is good for."""
    where = torch.device(device)
    if where.type != "cuda":
        compiled = where.type == "cpu" and compiler() is not None
        return Machine(kind=where.type, versions={"torch": str(torch.__version__), "c++": identity()} if compiled else {})
    versions = {package: select.version(package) for package in (*select.packages(), "triton")}
    versions |= {"torch": str(torch.__version__), "cuda": torch.version.cuda}
    return Machine(
        kind="cuda",
        capability=torch.cuda.get_device_capability(where),
        versions={name: found for name, found in versions.items() if found is not None},
    )


assert {field.name for field in fields(Kernels)} == {name for row in select.operations() for name in functions_of(row)} | DECODING.keys()
