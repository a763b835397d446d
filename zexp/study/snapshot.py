"""A copy of zexp's code as it is now, in the store: what a submitted job runs, also when it is requeued weeks later.

    store/code/<sha16>/   zexp/ hydra_plugins/ conf/ evals/   git.json   diff.patch   manifest.json

Named by the content of its files, so that studies share it, and published by one rename.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import zexp
from zexp.config import places
from zexp.store import files
from zexp.store.folder import Store
from zexp.store.provenance import provenance


def take(store: Store) -> Path:
    """The snapshot of the code that runs now; made if the store has none of this content."""
    parts = list(_parts())
    digest = hashlib.sha256()
    for name, path in parts:
        digest.update(f"{name}\0{files.sha256_file(path)}\n".encode())
    target = store.root / "code" / digest.hexdigest()[:16]
    if (target / files.MANIFEST).is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    try:
        os.chmod(scratch, 0o755)
        for name, path in parts:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, scratch / name)
        made = provenance()
        files.write_json(scratch / "git.json", {"git": made["git"], "zexp": made["zexp"]})
        if made["git"] is not None:
            files.write_atomic(scratch / "diff.patch", _diff())
        files.write_manifest(scratch)
        files.publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # it is gone if it was published
    return target


def moved(path: str, snapshot: Path) -> str:
    """A path of zexp's own files as it is in the snapshot; any other path as it is."""
    for name, folder in _folders():
        try:
            return str(snapshot / name / Path(path).resolve().relative_to(folder.resolve()))
        except ValueError:
            continue
    return path


def _folders() -> list[tuple[str, Path]]:
    """(name in the snapshot, where it is now) of what jobs need."""
    package = Path(zexp.__file__).parent
    beside = [("evals", places.evals_dir()), ("conf", places.conf_dir())]  # in a wheel inside the package
    return [
        *((name, folder) for name, folder in beside if package not in folder.parents),
        ("zexp", package),
        ("hydra_plugins/zexp", package.parent / "hydra_plugins" / "zexp"),
    ]


def _parts() -> Iterator[tuple[str, Path]]:
    """(relative name, file) of everything, sorted."""
    found: dict[str, Path] = {}
    for name, folder in _folders():
        for path in folder.rglob("*"):
            relative = path.relative_to(folder)
            if path.is_file() and "__pycache__" not in relative.parts and not path.name.endswith(".pyc"):
                found.setdefault(f"{name}/{relative.as_posix()}", path)
    yield from sorted(found.items())


def _diff() -> bytes:
    """What the checkout has changed since its commit."""
    checkout = Path(zexp.__file__).resolve().parent.parent
    done = subprocess.run(
        ["git", "--no-optional-locks", "-C", str(checkout), "diff", "HEAD", "--binary"], capture_output=True, timeout=60
    )
    if done.returncode != 0:
        return f"git diff failed: {done.stderr.decode(errors='replace').strip()}\n".encode()
    return done.stdout
