"""Which backend each operation gets. No torch.

torch runs everywhere. No operation has a fused backend yet, so `fused` is refused with what it would need.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from zexp.config.errors import ConfigError

CHOICES = ("auto", "torch", "fused")

# operation: (module, package) that its fused backend calls.
FUSED = {
    "attention": ("flash_attn", "flash-attn"),
    "causal_conv1d": ("causal_conv1d", "causal-conv1d"),
    "cross_entropy": ("liger_kernel", "liger-kernel"),
    "gated_norm": ("mamba_ssm", "mamba-ssm"),
    "ssd": ("mamba_ssm", "mamba-ssm"),
}


def backends(kernels: str, operations: Iterable[str]) -> dict[str, str]:
    """The backend of each operation. Raises ConfigError for an unknown choice and for `fused`."""
    operations = list(operations)
    if kernels not in CHOICES:
        raise ConfigError(f"kernels = {kernels}: choose one of {', '.join(CHOICES)}.")
    if kernels == "fused":
        raise ConfigError(_refusal(operations))
    return dict.fromkeys(operations, "torch")


def operations_of(numerics: Iterable[str]) -> list[str]:
    """The operations among the numerics numbers of a model ("kernel.ssd": ssd)."""
    return [name.removeprefix("kernel.") for name in numerics if name.startswith("kernel.")]


def _refusal(operations: list[str]) -> str:
    wanted = {FUSED[name] for name in operations if name in FUSED}
    missing = sorted(package for module, package in wanted if find_spec(module) is None)
    if missing:
        return (
            f"kernels = fused: {_listed(missing)} not installed. They come with the extra zexp[gpu] "
            "(pip install --no-build-isolation 'zexp[gpu]', on a machine with CUDA's compiler).\n"
            "  Without them, and until the fused backends are part of zexp, use kernels=auto or kernels=torch."
        )
    return (
        f"kernels = fused: this version of zexp has no fused backend for {', '.join(operations)}.\n"
        "  Use kernels=auto or kernels=torch."
    )


def _listed(packages: list[str]) -> str:
    return f"the package {packages[0]} is" if len(packages) == 1 else f"the packages {', '.join(packages)} are"
