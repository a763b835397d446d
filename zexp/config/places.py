"""Where zexp's own YAML lies: beside the package in a checkout, inside it in an installed wheel."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def _folder(name: str) -> Path:
    inside = _PACKAGE / name  # pyproject's force-include puts conf, sweeps and evals here in the wheel
    return inside if inside.is_dir() else _PACKAGE.parent / name


def conf_dir() -> Path:
    """The Hydra groups that zexp ships."""
    return _folder("conf")


def evals_dir() -> Path:
    """The lm-eval task YAMLs that zexp ships."""
    return _folder("evals")


def user_conf_dir(directory: Path) -> Path | None:
    """./conf of a user's own folder, or None; a checkout's own conf is not a user's."""
    mine = directory / "conf"
    if not mine.is_dir() or mine.resolve() == conf_dir().resolve():
        return None
    return mine.resolve()


def import_path(before: str) -> str:
    """A PYTHONPATH with which a new process finds this zexp, and what `before` names; it may be empty."""
    here = str(_PACKAGE.parent)
    installed = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    return os.pathsep.join(filter(None, (here if here not in installed else "", before)))
