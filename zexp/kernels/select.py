"""Which backend each operation gets: what there is, what is known to be wrong with it, and how one is chosen. No torch.

Every operation has a torch backend, right everywhere. On a GPU some have fused ones, in order of preference: the kernel that the
authors of an operation publish, then a more general one. On a CPU some have one in C++ (zexp/kernels/cpp). The order is fixed, not timed: a backend is part of a training's
fingerprint, and one that changed with the load of the machine would change its last bits from one resume to the next
(`zexp bench kernels` shows the times). A backend is taken if

- it runs on this device, and under deterministic algorithms where those are asked for,
- its packages are there,
- no defect of it is known for this device and these versions,
- it passed the self-check on this device (zexp/kernels/selfcheck.py).

auto: the first such backend, else torch. fused: the same, but a package that is missing, or that fails the self-check
where no other backend of the operation passes, is an error, and so is a CPU. torch: torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec

from zexp.config.errors import ConfigError
from zexp.kernels.cpp.compiler import compiler

CHOICES = ("auto", "torch", "fused")
TORCH = "torch"


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One fused implementation of an operation.

    name: in logs, tables and fingerprints; its adapter is the function of that name in
        zexp/kernels/<operation>/fused_backend.py, or cpp() in cpp_backend.py.
    device: cuda or cpu. package: the distribution that carries the kernel, None = torch itself, or zexp. modules: top-level modules that must be there.
    capability: the least compute capability. deterministic: whether repeats give the same bits under deterministic algorithms.
    """

    name: str
    package: str | None
    modules: tuple[str, ...]
    capability: tuple[int, int] = (8, 0)
    deterministic: bool = True
    device: str = "cuda"

    def missing(self) -> list[str]:
        """Those of its modules that are not installed."""
        return [module for module in self.modules if find_spec(module) is None]

    def adapter(self) -> str:
        """The name of the function that makes it ready."""
        return self.name.replace("-", "_")


_FLA = ("fla", "triton")

# What no fused kernel of these packages computes (mLSTM, sLSTM, routing, rotary angles …) has no entry: torch has it.
BACKENDS: dict[str, tuple[Backend, ...]] = {
    "attention": (
        Backend(name="flash-attn", package="flash-attn", modules=("flash_attn", "flash_attn_2_cuda")),
        Backend(name="torch-flash", package=None, modules=()),
    ),
    "causal_conv1d": (
        # Its backward pass adds to the weights' gradients in no fixed order.
        Backend(
            name="causal-conv1d", package="causal-conv1d", modules=("causal_conv1d", "causal_conv1d_cuda"), deterministic=False
        ),
        Backend(name="flash-linear-attention", package="flash-linear-attention", modules=_FLA),
    ),
    "cross_entropy": (Backend(name="liger-kernel", package="liger-kernel", modules=("liger_kernel", "triton")),),
    "gated_delta": (Backend(name="flash-linear-attention", package="flash-linear-attention", modules=_FLA),),
    "gated_norm": (
        Backend(name="mamba-ssm", package="mamba-ssm", modules=("mamba_ssm", "triton")),
        Backend(name="flash-linear-attention", package="flash-linear-attention", modules=_FLA),
    ),
    "retention": (Backend(name="flash-linear-attention", package="flash-linear-attention", modules=_FLA),),
    "rms_norm": (
        Backend(name="liger-kernel", package="liger-kernel", modules=("liger_kernel", "triton")),
        Backend(name="flash-linear-attention", package="flash-linear-attention", modules=_FLA),
    ),
    "selective_scan": (
        # Its backward pass adds to the gradients of B and C in no fixed order.
        Backend(name="mamba-ssm", package="mamba-ssm", modules=("mamba_ssm", "selective_scan_cuda"), deterministic=False),
    ),
    "ssd": (Backend(name="mamba-ssm", package="mamba-ssm", modules=("mamba_ssm", "triton")),),
    "wkv7": (Backend(name="flash-linear-attention", package="flash-linear-attention", modules=_FLA),),
}

CPP = Backend(name="cpp", package=None, modules=(), device="cpu")
IN_CPP = (
    "activation", "attention", "causal_conv1d", "cross_entropy", "gated_norm", "moe", "rms_norm", "rotary", "selective_scan", "ssd",
)  # fmt: skip


def candidates(operation: str, kind: str) -> tuple[Backend, ...]:
    """The backends besides torch that an operation has on a kind of device, the first choice first."""
    if kind == "cpu":
        return (CPP,) if operation in IN_CPP else ()
    return BACKENDS.get(operation, ()) if kind == "cuda" else ()


def backends(operation: str) -> tuple[Backend, ...]:
    """All that an operation has besides torch, whatever they run on."""
    return candidates(operation, "cuda") + candidates(operation, "cpu")


def operations() -> list[str]:
    """Those that have a backend besides torch on some device."""
    return sorted({*BACKENDS, *IN_CPP})


@dataclass(frozen=True, kw_only=True)
class Defect:
    """What is known to be wrong with a package's kernels of some operations, and where.

    issue: where it is reported. capability: compute capabilities, as "9." (all of 9.x) or "10.3"; None = all. versions: of
    packages, as version specifiers; all must hold ("cuda": of torch's toolkit, which the kernels are built with). calls: what
    kind of call it concerns, where the backend is otherwise sound: its adapter leaves those to torch, and nothing is excluded.
    """

    package: str
    operations: tuple[str, ...]
    issue: str
    what: str
    capability: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    calls: str | None = None

    def holds(self, operation: str, backend: Backend, machine: Machine) -> bool:
        """Whether it excludes the backend for the operation on that machine."""
        from packaging.specifiers import SpecifierSet

        if self.calls is not None or backend.package != self.package or operation not in self.operations:
            return False
        if self.capability is not None and not machine.capability_text.startswith(self.capability):
            return False
        return all(
            package in machine.versions and SpecifierSet(wanted, prereleases=True).contains(machine.versions[package])
            for package, wanted in self.versions.items()
        )


DEFECTS: tuple[Defect, ...] = (
    Defect(
        package="flash-linear-attention",
        operations=("gated_delta",),
        issue="fla-org/flash-linear-attention#640, #983",
        what="its backward pass with gates is wrong on Hopper with this triton, and refuses to run",
        capability="9.",
        versions={"triton": ">=3.4,<3.7.1"},
    ),
    Defect(
        package="flash-linear-attention",
        operations=("retention",),
        issue="fla-org/flash-linear-attention#640, #983",
        what="its backward pass with gates is wrong on Hopper with this triton, and nothing guards that of constant decays",
        capability="9.",
        versions={"triton": ">=3.4,<3.7.1"},
    ),
    Defect(
        package="causal-conv1d",
        operations=("causal_conv1d",),
        issue="Dao-AILab/causal-conv1d#105",
        what="built for compute capability 10.3 by the compiler of CUDA 13 it computes wrong values",
        capability="10.3",
        versions={"cuda": ">=13,<14"},
    ),
    Defect(
        package="mamba-ssm",
        operations=("ssd",),
        issue="state-spaces/mamba#1015",
        what="offsets of 2^31 elements and more wrap around, and values are wrong without a word",
        calls="an array of 2^31 elements or more",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where kernels would run: device kind (cpu, cuda), compute capability, versions of torch, cuda, triton and the packages."""

    kind: str
    capability: tuple[int, int] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def capability_text(self) -> str:
        return "" if self.capability is None else f"{self.capability[0]}.{self.capability[1]}"


@dataclass(frozen=True)
class Choice:
    """The backend that an operation gets, and what was said against those before it, as (name, reason)."""

    backend: Backend | None
    passed_over: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return TORCH if self.backend is None else self.backend.name


def check(kernels: str, operations: Iterable[str], device: str = "auto") -> None:
    """What can be said before there is a device. device: auto, cpu or cuda, as execution.device.

    Raises ConfigError for an unknown choice, and for `fused` on a CPU or without the packages that it needs.
    """
    if kernels not in CHOICES:
        raise ConfigError(f"kernels = {kernels}: choose one of {', '.join(CHOICES)}.")
    if kernels != "fused":
        return
    if device == "cpu":
        raise ConfigError(_no_device())
    missing = _without_any(operations)
    if missing:
        raise ConfigError(_not_installed(missing))


def choose(
    kernels: str,
    operations: Iterable[str],
    machine: Machine,
    *,
    deterministic: bool,
    failing: Callable[[str, Backend], str | None],
) -> dict[str, Choice]:
    """The backend of each operation on a machine.

    failing: why a backend of an operation cannot be trusted on this device (it does not import, or fails the self-check), None =
    it can; asked only where nothing else speaks against it. Raises ConfigError as `check`, and for `fused` where every
    backend of an operation that could be tried cannot be trusted.
    """
    operations = list(operations)
    check(kernels, operations, machine.kind)
    if kernels == "torch":
        return {operation: Choice(None) for operation in operations}
    choices: dict[str, Choice] = {}
    untrusted: list[str] = []
    for operation in operations:
        choices[operation], failed = _choose(operation, machine, deterministic, failing)
        if failed and choices[operation].backend is None:
            untrusted += failed
    if kernels == "fused" and untrusted:
        raise ConfigError(
            "kernels = fused: what was found cannot be trusted on this device:\n  "
            + "\n  ".join(untrusted)
            + "\n  Use kernels=auto, which takes torch for these, or kernels=torch."
        )
    return choices


def reason_against(operation: str, backend: Backend, machine: Machine, *, deterministic: bool) -> str | None:
    """Why a backend is not even tried on a machine, None = nothing speaks against it."""
    if machine.kind != backend.device:
        return "needs a CUDA device" if backend.device == "cuda" else "runs on a CPU"
    if backend is CPP and compiler() is None:
        return "no C++ compiler was found (g++, clang++ or $CXX)"
    if machine.capability is not None and machine.capability < backend.capability:
        return f"needs compute capability {backend.capability[0]}.{backend.capability[1]}, this is {machine.capability_text}"
    if absent := backend.missing():
        return f"not installed ({', '.join(absent)})"
    for defect in DEFECTS:
        if defect.holds(operation, backend, machine):
            return f"known defect: {defect.what} ({defect.issue})"
    if deterministic and not backend.deterministic:
        return "not deterministic, and execution.deterministic is true"
    return None


def operations_of(numerics: Iterable[str]) -> list[str]:
    """The operations among the numerics numbers of a model ("kernel.ssd": ssd)."""
    return [name.removeprefix("kernel.") for name in numerics if name.startswith("kernel.")]


def packages() -> list[str]:
    """The distributions that carry fused kernels."""
    return sorted({backend.package for row in BACKENDS.values() for backend in row if backend.package is not None})


def version(package: str) -> str | None:
    """The installed version of a distribution; None = it is not there, or tells none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _choose(
    operation: str, machine: Machine, deterministic: bool, failing: Callable[[str, Backend], str | None]
) -> tuple[Choice, list[str]]:
    """The choice, and what failed on the way to it."""
    passed_over: list[tuple[str, str]] = []
    failed: list[str] = []
    for backend in candidates(operation, machine.kind):
        reason = reason_against(operation, backend, machine, deterministic=deterministic)
        if reason is None:
            reason = failing(operation, backend)
            if reason is None:
                return Choice(backend, tuple(passed_over)), failed
            failed.append(f"{operation} by {backend.name}: {reason}")
        passed_over.append((backend.name, reason))
    return Choice(None, tuple(passed_over)), failed


def _without_any(operations: Iterable[str]) -> list[str]:
    """The packages, first choices, of operations that have fused backends of which none is installed."""
    rows = [BACKENDS[operation] for operation in operations if operation in BACKENDS]
    return sorted({str(row[0].package) for row in rows if all(backend.missing() for backend in row)})


def _not_installed(missing: list[str]) -> str:
    return (
        f"kernels = fused: {_listed(missing)} not installed. They come with the extra zexp[gpu] "
        "(pip install --no-build-isolation 'zexp[gpu]', on a machine with CUDA's compiler).\n"
        "  Without them use kernels=auto, which takes those that are there, or kernels=torch."
    )


def _no_device() -> str:
    return (
        "kernels = fused: fused kernels run on a CUDA device, and the device is cpu.\n"
        "  Use kernels=auto or kernels=torch there."
    )


def _listed(packages: list[str]) -> str:
    return f"the package {packages[0]} is" if len(packages) == 1 else f"the packages {', '.join(packages)} are"
