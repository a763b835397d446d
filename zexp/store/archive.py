"""One file with a part of a store in it: a tar, gzipped or not, that says what it is and has a checksum of each file.

    zexp-archive.json    first: {format, …what its maker says of it}
    <kind>/<hash16>/…    studies/<name>/…    files as they lie in a store
    checksums.json       last: {path: {bytes, sha256}}; without it the archive was cut off

Written and read as a stream. Reading trusts nothing: only plain files, only under names that a store has, each with the
checksum that is listed; nothing is unpacked by tarfile itself.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import secrets
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from zexp.config.errors import ConfigError
from zexp.store import files
from zexp.store.errors import StoreError
from zexp.store.folder import KINDS
from zexp.store.ids import SHORT

FORMAT = 1
ABOUT, CHECKSUMS = "zexp-archive.json", "checksums.json"
SUFFIXES = (".tar.gz", ".tgz", ".tar")
_MEMBER = re.compile(rf"(?:(?:{'|'.join(KINDS)})/[0-9a-f]{{{SHORT}}}|studies/[^/]+)(?:/[^/]+)+")
_CHUNK = 1 << 20
_LARGEST_TEXT = 1 << 30  # of the two JSON files, in bytes


def check_name(path: Path) -> None:
    """Raises ConfigError for a name that says another format than the two that are written."""
    if not path.name.endswith(SUFFIXES):
        raise ConfigError(f"{path}: an archive's name ends in {', '.join(SUFFIXES)}. (zstandard needs a package that zexp does not have.)")


def write(
    path: Path,
    about: dict[str, Any],
    entries: Iterable[tuple[str, Path]],
    *,
    level: int = 6,
    on_bytes: Callable[[int], None] | None = None,
) -> int:
    """Write an archive of (name in it, file) entries; its size in bytes. level: gzip's, 1 to 9.

    The file appears whole or not at all, and replaces nothing. Raises StoreError if a file disappears while this works.
    """
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    sums: dict[str, dict[str, Any]] = {}
    try:
        with open(temporary, "xb") as raw:
            with _compressed(raw, path, level) as stream, tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:
                _add_text(tar, ABOUT, {"format": FORMAT, **about})
                for name, file in entries:
                    sums[name] = _add_file(tar, name, file, on_bytes)
                _add_text(tar, CHECKSUMS, sums)
            raw.flush()
            os.fsync(raw.fileno())
        try:
            os.link(temporary, path)  # unlike a renaming it replaces nothing
        except FileExistsError:
            raise ConfigError(f"{path} is there already. Name another file, or move it away.") from None
        except OSError:  # a file system without links
            if path.exists():
                raise ConfigError(f"{path} is there already. Name another file, or move it away.") from None
            os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    files.sync_folder(path.parent)
    return path.stat().st_size


def read_about(path: Path) -> dict[str, Any]:
    """What an archive says of itself. Raises ConfigError if it is none, StoreError if it is damaged."""
    with _opened(path) as tar:
        return _about(path, next(iter(tar), None), tar)


def unpack(path: Path, into: Path, on_bytes: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Unpack all files below `into`, an empty folder, and compare them with their checksums. What read_about() says.

    Raises ConfigError for an archive that holds what no store has (links, names with .., absolute ones), StoreError for one
    that is damaged or cut off. What was unpacked by then stays for the caller to delete.
    """
    found: dict[str, dict[str, Any]] = {}
    listed: Any = None
    with _opened(path) as tar:
        members = iter(tar)
        about = _about(path, next(members, None), tar)
        for member in members:
            if listed is not None:
                raise ConfigError(f"{path}: {member.name!r} comes after the checksums. Nothing was imported.")
            if member.name == CHECKSUMS and member.isreg():
                listed = _json(path, member, tar)
                continue
            _check_member(path, member, found)
            found[member.name] = _copy(path, tar, member, into / member.name, on_bytes)
    if listed is None:
        raise StoreError(f"{path} is cut off: its last file, {CHECKSUMS}, is missing. Copy it again.")
    if not isinstance(listed, dict) or listed.keys() != found.keys():
        odd = sorted(set(listed) ^ found.keys()) if isinstance(listed, dict) else []
        raise StoreError(f"{path} does not hold what {CHECKSUMS} lists: {', '.join(odd[:3])}. Copy it again.")
    if bad := sorted(name for name in found if listed[name] != found[name]):
        raise StoreError(f"{path}: {len(bad)} files have been altered; the first is {bad[0]}. Copy it again.")
    return about


def _compressed(raw: IO[bytes], path: Path, level: int) -> Any:
    if path.name.endswith(".tar"):
        return contextlib.nullcontext(raw)
    # mtime=0: the same content makes the same archive
    return gzip.GzipFile(filename="", mode="wb", compresslevel=level, fileobj=raw, mtime=0)


def _add_text(tar: tarfile.TarFile, name: str, value: Any) -> None:
    data = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    tar.addfile(_facts(name, len(data)), io.BytesIO(data))


def _add_file(tar: tarfile.TarFile, name: str, path: Path, on_bytes: Callable[[int], None] | None) -> dict[str, Any]:
    if not _MEMBER.fullmatch(name):
        raise StoreError(f"{path}: a file of this name cannot be put into an archive.")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size  # a log may grow meanwhile
            reader = _Reader(file, on_bytes)
            tar.addfile(_facts(name, size), reader)  # type: ignore[arg-type]
    except FileNotFoundError:
        raise StoreError(f"{path} was deleted while it was exported; a run goes on there. Export again.") from None
    except OSError as error:
        if error.errno is None:  # tarfile's "unexpected end of data"
            raise StoreError(f"{path} became shorter while it was exported. Export again.") from error
        raise
    return {"bytes": size, "sha256": reader.sha256.hexdigest()}


class _Reader:
    """A file that hashes what is read of it."""

    def __init__(self, file: IO[bytes], on_bytes: Callable[[int], None] | None):
        self._file, self._on_bytes = file, on_bytes
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.sha256.update(data)
        if self._on_bytes is not None:
            self._on_bytes(len(data))
        return data


def _facts(name: str, size: int) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)  # nobody's user, no time: what a store needs of a file is its content
    made.size, made.mode = size, 0o644
    return made


def _opened(path: Path) -> tarfile.TarFile:
    try:
        return _Stream.open(path, mode="r|*")
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there.") from None
    except (StoreError, tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"{path} is no archive that `zexp store export` wrote: it is no tar file.") from error


class _Stream(tarfile.TarFile):
    """Damage that shows while members are read is a StoreError."""

    def next(self) -> tarfile.TarInfo | None:
        try:
            return super().next()
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise StoreError(f"{os.fsdecode(self.name or 'the archive')} is cut off or damaged: {error}. Copy it again.") from error


def _about(path: Path, member: tarfile.TarInfo | None, tar: tarfile.TarFile) -> dict[str, Any]:
    about = _json(path, member, tar) if member is not None and member.name == ABOUT and member.isreg() else None
    if not isinstance(about, dict) or "format" not in about:
        raise ConfigError(f"{path} is no archive that `zexp store export` wrote: it does not begin with {ABOUT}.")
    if about["format"] != FORMAT:
        raise ConfigError(f"{path} has the format {about['format']}, this zexp reads {FORMAT}. Use the zexp that wrote it, or a newer one.")
    return about


def _json(path: Path, member: tarfile.TarInfo, tar: tarfile.TarFile) -> Any:
    if member.size > _LARGEST_TEXT:
        raise ConfigError(f"{path}: {member.name} has {member.size} bytes. Nothing was imported.")
    file = tar.extractfile(member)
    assert file is not None, "a plain file"
    try:
        return json.loads(file.read())
    except (ValueError, tarfile.TarError, EOFError, zlib.error) as error:
        raise StoreError(f"{path}: {member.name} is not readable: {error}. Copy the archive again.") from error


def _check_member(path: Path, member: tarfile.TarInfo, found: dict[str, Any]) -> None:
    if not member.isreg() or member.issparse():
        what = "a link" if member.issym() or member.islnk() else "no plain file"
        raise ConfigError(f"{path}: {member.name!r} is {what}. An archive of zexp has plain files only; nothing was imported.")
    parts = member.name.split("/")
    if not _MEMBER.fullmatch(member.name) or {".", ".."} & set(parts) or "\0" in member.name or "\\" in member.name:
        raise ConfigError(f"{path}: {member.name!r} is no file that a store has. Nothing was imported.")
    if member.name in found:
        raise ConfigError(f"{path}: {member.name!r} is in it twice. Nothing was imported.")


def _copy(
    path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, to: Path, on_bytes: Callable[[int], None] | None
) -> dict[str, Any]:
    source = tar.extractfile(member)
    assert source is not None, "a plain file"
    digest, size = hashlib.sha256(), 0
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        file = open(to, "xb")  # noqa: SIM115 - closed below, and its errors are the archive's
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{path}: {member.name!r} is a file and a folder. Nothing was imported.") from None
    with file:
        while True:
            try:
                data = source.read(_CHUNK)
            except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise StoreError(f"{path} is cut off or damaged in {member.name}: {error}. Copy it again.") from error
            if not data:
                break
            file.write(data)
            digest.update(data)
            size += len(data)
            if on_bytes is not None:
                on_bytes(len(data))
    return {"bytes": size, "sha256": digest.hexdigest()}
