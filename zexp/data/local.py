"""Sources in files of one's own: plain text, JSON lines, Parquet.

Everything that can be wrong with a file is found at plan time, by reading it once; what was found is cached by the
file's sha256, so the next plan reads nothing.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zexp.config.errors import ConfigError
from zexp.store import files as store_files
from zexp.store.errors import StoreError
from zexp.store.fingerprint import DigestCache

NUMERICS = {"data.local": 1}
DOCUMENTS = ("file", "line", "paragraph")
_PARQUET_ROWS = 8192  # read at a time


class ContentError(ValueError):
    """A file does not hold what its source says; the text names the place."""


def semantic(source: dict[str, Any], directory: Path, cache: Path, key: str) -> dict[str, Any]:
    """{kind, documents | text_key, files: [{name, bytes, sha256}], counts: {documents, bytes}}.

    cache: the store's cache folder.  A name is relative to `directory` where the file was named so.
    Raises ConfigError, with every bad file, for no files, a file that cannot be read, text that is not UTF-8, a
    missing key or column, one of a wrong type, and sources without any text.
    """
    kind = source["kind"]
    made: dict[str, Any] = {"kind": kind}
    if kind == "text":
        made["documents"] = source.get("documents") or "file"
        if made["documents"] not in DOCUMENTS:
            raise ConfigError(
                f"{key}.documents = {made['documents']!r}: one document is a {', a '.join(DOCUMENTS)}. "
                "Set one of these."
            )
    else:
        made["text_key"] = source.get("text_key") or "text"
    names = _names(source.get("files"), directory, key)
    digests = DigestCache(cache / "files.json")
    checked = _Checked(cache / "sources.json")
    rows, problems, documents, size = [], [], 0, 0
    for name in names:
        path = directory / name
        try:
            length, sha256 = digests.sha256(path)
            found, text_bytes = checked.counts(made, path, sha256)
        except ContentError as error:
            problems.append(f"{key}: {name}{error}")
        except OSError as error:
            problems.append(f"{key}: {name} cannot be read: {error.strerror}.")
        else:
            rows.append({"name": name, "bytes": length, "sha256": sha256})
            documents += found
            size += text_bytes
    digests.save()
    checked.save()
    if not problems and not documents:
        problems.append(f"{key}: there is no text in its {len(rows)} file(s), {', '.join(names[:3])}. Put some in.")
    if problems:
        raise ConfigError(problems)
    return {**made, "files": rows, "counts": {"documents": documents, "bytes": size}}


def read(source: dict[str, Any], path: Path) -> Iterator[str]:
    """The documents of one file, blank ones left out, for a semantic block as above.

    Raises ContentError where the file is not what it should be.
    """
    texts = {"text": _text, "jsonl": _jsonl, "parquet": _parquet}[source["kind"]](source, path)
    return (text for text in texts if text.strip())


def _names(patterns: Any, directory: Path, key: str) -> list[str]:
    """Every file that the globs name, sorted, as POSIX paths."""
    globs = [patterns] if isinstance(patterns, str) else list(patterns or [])
    if not globs or not all(isinstance(pattern, str) and pattern for pattern in globs):
        raise ConfigError(f"{key}.files = {patterns!r}: name files, e.g. files: texts/*.txt, or a list of such names.")
    problems: list[str] = []
    names: set[str] = set()
    for pattern in globs:
        found = [
            name
            for name in glob.glob(os.path.expanduser(pattern), root_dir=directory, recursive=True)
            if (directory / name).is_file()
        ]
        if not found:
            at = (directory / pattern).parent
            there = f" in {directory}" if not os.path.isabs(pattern) else ""
            hint = "" if glob.has_magic(str(at)) or at.is_dir() else f" ({at} is not there)"
            problems.append(f"{key}.files: no file matches {pattern!r}{there}{hint}. Correct the path.")
        names.update(Path(os.path.normpath(name)).as_posix() for name in found)
    for name in names:
        if not _is_unicode(name):
            problems.append(f"{key}.files: {name!r} is no valid Unicode name. Rename the file.")
    if problems:
        raise ConfigError(problems)
    return sorted(names)


def _text(source: dict[str, Any], path: Path) -> Iterator[str]:
    lines = _lines(path)
    if source["documents"] == "line":
        yield from (line.rstrip("\n") for line in lines)
    elif source["documents"] == "file":
        yield "".join(lines)
    else:
        paragraph: list[str] = []
        for line in lines:
            if line.strip():
                paragraph.append(line)
            elif paragraph:
                yield "".join(paragraph)
                paragraph = []
        yield "".join(paragraph)


def _lines(path: Path) -> Iterator[str]:
    """Lines with \\n ends, of whatever ends the file has; a byte-order mark is no text."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ContentError(
                    f", line {number} is not UTF-8: byte {raw[error.start]:#04x} at position {error.start + 1}. "
                    "Convert the file (iconv -t UTF-8)."
                ) from error
            yield line[:-2] + "\n" if line.endswith("\r\n") else line


def _jsonl(source: dict[str, Any], path: Path) -> Iterator[str]:
    key = source["text_key"]
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            raise ContentError(f", line {number} is no JSON: {error.msg} at column {error.colno}.") from error
        if not isinstance(record, dict):
            raise ContentError(f", line {number} is a JSON {_json_type(record)}; each line must be an object.")
        if key not in record:
            raise ContentError(
                f", line {number} has no key {key!r}; it has {', '.join(sorted(record)) or 'none'}. Set text_key."
            )
        if not isinstance(record[key], str):
            raise ContentError(f", line {number}: {key!r} is a JSON {_json_type(record[key])}, not a string.")
        if not _is_unicode(record[key]):
            raise ContentError(f", line {number}: {key!r} has half of a surrogate pair, which is no text.")
        yield record[key]


def _parquet(source: dict[str, Any], path: Path) -> Iterator[str]:
    import polars  # 0.2 s, for Parquet only

    key = source["text_key"]
    try:
        frame = polars.scan_parquet(path, glob=False)
        schema = frame.collect_schema()
        if key not in schema:
            raise ContentError(f" has no column {key!r}; it has {', '.join(schema)}. Set text_key.")
        if schema[key] != polars.String:
            raise ContentError(f": its column {key!r} is {schema[key]}, not String.")
        rows = frame.select(polars.len()).collect().item()
        for start in range(0, rows, _PARQUET_ROWS):
            part = frame.select(key).slice(start, _PARQUET_ROWS).collect()
            yield from (text for text in part[key] if text is not None)
    except polars.exceptions.PolarsError as error:
        raise ContentError(f" is no Parquet file that can be read: {str(error).splitlines()[0]}.") from error


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _json_type(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")


class _Checked:
    """(documents, bytes of text) of files that were read whole and found good, by content and by how it is read."""

    def __init__(self, path: Path):
        self._path = path
        self._known = self._load()
        self._new: dict[str, list[int]] = {}

    def counts(self, source: dict[str, Any], path: Path, sha256: str) -> tuple[int, int]:
        how = source.get("documents") or source.get("text_key")
        entry = f"{NUMERICS['data.local']}:{source['kind']}:{how}:{sha256}"
        if entry not in self._known:
            documents = size = 0
            for text in read(source, path):
                documents += 1
                size += len(text.encode())
            self._known[entry] = self._new[entry] = [documents, size]
        documents, size = self._known[entry]
        return documents, size

    def save(self) -> None:
        if not self._new:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            store_files.write_json(self._path, {**self._load(), **self._new})
        except OSError:
            return  # a store that may only be read: the next plan checks again

    def _load(self) -> dict[str, list[int]]:
        try:
            known = store_files.read_json(self._path)
        except (OSError, StoreError):
            return {}  # not there, or damaged: it is a cache
        return known if isinstance(known, dict) else {}
