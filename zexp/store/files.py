"""Files that appear whole, folders that are published by one rename, and the checksums that prove both.

write_atomic is the only function that writes a file in the store; publish is the only one that makes a folder
count as done. Killed at any instant, both leave either nothing or everything under the final name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from zexp.store.errors import StoreError

MANIFEST = "manifest.json"


def write_atomic(path: Path, data: bytes | str, *, sync: bool = True) -> None:
    """Write data (str as UTF-8) to path: temporary file, fsync, rename, fsync of the folder.

    sync=False leaves both fsyncs out: readers still see the old or the new text and nothing between, but a
    power cut may lose it. For hints that are written twice a second, not for results.
    """
    raw = data.encode("utf-8") if isinstance(data, str) else data
    # Not named after path (names may be 255 long already); not tempfile (0600 locks out a store's group).
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(raw)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def write_json(path: Path, value: Any, *, sync: bool = True) -> None:
    """Raises ValueError for NaN and infinities, which are not JSON."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", sync=sync)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # JSON and UTF-8 errors
        raise StoreError(f"{path} is not readable JSON: {error}") from error


def write_yaml(path: Path, value: Any) -> None:
    """Keys keep their order; plain types only; every float reads back as the same float."""
    write_atomic(path, yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110))


def read_yaml(path: Path) -> Any:
    """Reads what write_yaml wrote. (YAML 1.1 takes a hand-written 1e-5 for text; write_yaml: 1.0e-05.)"""
    try:
        return yaml.load(path.read_bytes(), Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise StoreError(f"{path} is not readable YAML: {error}") from error


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """{relative path with /: {bytes, sha256}} of every file below folder but the manifest itself, sorted.

    Raises StoreError for anything that is neither file nor folder: a link's target is not published with it.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST:
            found[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return dict(sorted(found.items()))


def write_manifest(folder: Path, **extra: Any) -> None:
    """manifest.json: the JSON object that its maker wrote, if any, extra, and files = checksums(folder)."""
    path = folder / MANIFEST
    manifest = read_json(path) if path.exists() else {}
    if not isinstance(manifest, dict) or "files" in manifest:
        raise StoreError(f"{path}: expected a JSON object without 'files', which is added on publishing.")
    write_json(path, {**manifest, **extra, "files": checksums(folder)})


def verify_manifest(folder: Path, *, contents: bool = True) -> None:
    """Compare a published folder with its manifest. contents=False looks at names and sizes only.

    The folders that the manifest lists under "droppable" may be missing, but only as a whole.
    Raises StoreError naming every file that is missing, truncated or altered, or the manifest itself.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(f"{path} is missing: the folder was never published whole.")
    manifest = read_json(path)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        raise StoreError(f"{path} has no 'files': it is not a manifest that the store wrote.")
    dropped = [part for part in manifest.get("droppable", []) if not (folder / part).exists()]
    problems = []
    for name, expected in files.items():
        if name.split("/", 1)[0] in dropped:
            continue
        file = folder / name
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif (found := file.stat().st_size) != expected["bytes"]:
            problems.append(f"{file} has {found} bytes, its manifest says {expected['bytes']}")
        elif contents and sha256_file(file) != expected["sha256"]:
            problems.append(f"{file} has been altered: its sha256 is not its manifest's")
    if problems:
        raise StoreError("; ".join(problems) + ".")


def publish(source: Path, target: Path, *, before_rename: Callable[[], None] | None = None) -> bool:
    """Make the folder source appear as target, whole or not at all. True if it did, False if target existed.

    Both on one file system. Everything in source is on disk before the rename; before_rename is called
    between the two (which may be minutes apart) and may raise to stop it. The first publisher wins.
    """
    if target.is_dir() and any(target.iterdir()):
        return False
    sync_tree(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    if before_rename is not None:
        before_rename()
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        # An NFS client may repeat a rename whose answer got lost; the repetition then finds no source.
        if not (error.errno == errno.ENOENT and target.is_dir() and not source.exists()):
            raise
    sync_folder(target.parent)
    sync_folder(source.parent)
    return True


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below and including folder."""
    for path in _files(folder):
        _sync(path)
    for parent, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that a rename in it survives a power cut."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems without fsync of folders: their server does it
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, onerror=_raise):
        for name in folders + names:
            path = Path(parent, name)
            if path.is_symlink():
                raise StoreError(f"{path} is a link; only files and folders can be published.")
            if path.is_file():
                yield path
            elif not path.is_dir():
                raise StoreError(f"{path} is neither a file nor a folder; it cannot be published.")


def _raise(error: OSError) -> None:
    raise error


# The C versions where libyaml is (all wheels): 10 times faster, and plan reads one config.yaml a stage.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Dumper(_SafeDumper):  # type: ignore[misc]  # chosen at run time
    def ignore_aliases(self, data: Any) -> bool:
        return True  # a list that is used twice is written twice: people read these files
