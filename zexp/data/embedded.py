"""The files of the embedded source: Python that is on every machine that runs zexp.  Reading them is documents.py.

Nothing is imported from the packages: they are found, listed and hashed (torch-free and fast enough for plan time).
The files differ between environments, and so do the ids and scores made from them: the manifest says package==version.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zexp.config.errors import ConfigError
from zexp.store.fingerprint import DigestCache, file_fingerprint

NUMERICS = {"data.embedded": 2}
PACKAGES = {  # by view
    "base": ("stdlib", "numpy", "scipy"),
    "high_quality": ("stdlib", "numpy", "scipy", "topics"),
}
# Tests, what other packages put there, data that is Python by name only, and what is made when Python is built (it
# holds the paths of the machine it was built on).
_LEFT_OUT = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
_BUILT = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class EmbeddedFile:
    """One file: its name is package/path, so it does not depend on where the package is."""

    package: str
    name: str
    path: str  # strings, not Path: 1,600 of them are listed at every plan


def semantic(view: str | None, packages: list[str] | None, cache: DigestCache, key: str) -> dict[str, Any]:
    """{kind, view, packages, files: {files, bytes, sha256}}; ConfigError for a view or package that there is not."""
    if view not in PACKAGES:
        raise ConfigError(
            f"{key}.view = {view!r}: an embedded source has the views {' and '.join(PACKAGES)}. "
            f"Set {key}.view to one of them."
        )
    names = list(PACKAGES[view]) if packages is None else list(packages)
    problems = [
        f"{key}.packages: {name!r} is not among what the view {view} has: {', '.join(PACKAGES[view])}."
        for name in names
        if name not in PACKAGES[view]
    ]
    if not names:
        problems.append(f"{key}.packages is empty. Name some of {', '.join(PACKAGES[view])}, or leave it null for all.")
    if problems:
        raise ConfigError(problems)
    names = [name for name in PACKAGES[view] if name in names]
    named = [(file.name, Path(file.path)) for name in names for file in files(name, key)]
    return {"kind": "embedded", "view": view, "packages": names, "files": file_fingerprint(named, cache)}


def files(package: str, key: str = "source") -> list[EmbeddedFile]:
    """The Python files of a package, sorted by name; ConfigError if it is not on this machine."""
    root = _root(package, key)
    if package == "topics":
        return [EmbeddedFile(package, "topics/topics.py", os.path.join(root, "topics.py"))]
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _LEFT_OUT and not name.startswith(_BUILT))
        for name in names:
            if name.endswith(".py") and not name.startswith(_BUILT):
                path = os.path.join(folder, name)
                inside = path[len(root) + 1 :].replace(os.sep, "/")
                found.append(EmbeddedFile(package, f"{package}/{inside}", path))
    if not found:
        raise ConfigError(
            f"{key}.packages: {package} has no Python source in {root} (compiled only?). "
            f"Leave {package} out of {key}.packages."
        )
    return sorted(found, key=lambda file: file.name)


def versions(packages: list[str]) -> dict[str, str]:
    """Package -> version; the standard library and its topics have Python's."""
    python = platform.python_version()
    return {name: python if name in ("stdlib", "topics") else importlib.metadata.version(name) for name in packages}


def _root(package: str, key: str) -> str:
    """The folder of a package, found without importing it."""
    if package == "stdlib":
        return sysconfig.get_path("stdlib")
    if package == "topics":
        folder = os.path.join(sysconfig.get_path("stdlib"), "pydoc_data")
        if os.path.isfile(os.path.join(folder, "topics.py")):
            return folder
        raise ConfigError(
            f"{key}.packages: this Python has no {folder}/topics.py (some distributions leave it out). "
            f"Set {key}.packages to [stdlib, numpy, scipy]."
        )
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"{key}.packages: {package} is not installed here. Install it, or leave it out.")
    return os.path.dirname(spec.origin)
