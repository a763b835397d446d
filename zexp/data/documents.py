"""The documents of a source, each once, each either for training or held out.

The embedded source is split by file, and a file is on the same side in both of its views: code never trains beside
held-out docstrings of its own.  Other sources are split by document.  Both go by content hashes, so the side does not
depend on what else is there, on the machine or on time.

Two documents are one if their texts are equal; of docstrings, if the docstrings are, whatever their signatures.  Where
a held-out document is also in a training file, it trains.
"""

from __future__ import annotations

import ast
import hashlib
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zexp.data import embedded, local
from zexp.data.docstrings import Taken, decode, take_apart
from zexp.store.errors import StoreError
from zexp.store.fingerprint import DigestCache


@dataclass(frozen=True)
class Document:
    """One document. A docstring's text is its signature, a line end, and the docstring."""

    file: str  # package/path of the embedded source, else the file's name
    text: str
    heldout: bool
    digest: bytes  # sha256 of what makes it distinct
    # The view high_quality alone:
    symbol: str = ""  # module | class | function | topic
    name: str = ""  # qualified, 'scipy.stats._fit.fit'; of a topic its title
    signature: str = ""  # the def or class line(s); of a module 'import x.y', of a topic "help('x')"

    @property
    def docstring(self) -> str:
        """The text after the signature; empty where there is none."""
        return self.text[len(self.signature) + 1 :] if self.signature else ""


@dataclass
class Tally:
    """What was met while reading; goes into the manifest, so that nothing is dropped in silence."""

    duplicates: int = 0
    errors: list[dict[str, str]] = field(default_factory=list)  # {file, error}: no Python, or not in its encoding


def documents(
    source: dict[str, Any],
    heldout: float,
    *,
    directory: Path,
    cache: Path | None = None,
    part: str | None = None,
    tally: Tally | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[Document]:
    """Every distinct document of a source, training ones first where the split is by file.

    source: a semantic block of recipe.source_semantic; its files must still be what they were then.
    heldout: the share held out (split.heldout). part: 'train' or 'heldout' alone. directory: what relative names are
    relative to. cache: the store's cache folder (saves hashing the files again). on_bytes: called with the size of
    each file read.  Raises StoreError if the files changed.
    """
    if part not in (None, "train", "heldout"):
        raise ValueError(f"part {part!r} is neither train nor heldout")
    tally = tally if tally is not None else Tally()
    read = _embedded if source["kind"] == "embedded" else _local
    seen: set[bytes] = set()
    # A held-out document counts as such only if no training file has it: those come first, wanted or not.
    for document in read(source, heldout, directory, cache, tally, on_bytes or _ignore, part != "train"):
        if document.digest in seen:
            tally.duplicates += 1
            continue
        seen.add(document.digest)
        if part is None or document.heldout == (part == "heldout"):
            yield document


def sample(
    source: dict[str, Any], heldout: float, size: int, *, directory: Path, cache: Path | None = None
) -> Iterator[str]:
    """Training texts of about `size` bytes: whole files (embedded) or documents, in the order of their hashes.

    The embedded source stops parsing when it has enough; the others are read whole.
    """
    tally = Tally()
    taken = 0
    if source["kind"] == "embedded":
        chosen = sorted(_files(source, cache), key=lambda item: item[1][16:])
        for file, digest, data in chosen:
            if file.package != "topics" and is_heldout(digest, heldout):
                continue
            for document in _documents_of(source["view"], file, data, False, tally):
                if taken >= size:
                    return
                if file.package == "topics" and is_heldout(document.digest, heldout):
                    continue
                taken += len(document.text.encode())
                yield document.text
        return
    kept: list[tuple[int, int, str]] = []  # a heap of the smallest hashes (negated: its top is the largest)
    for document in documents(source, heldout, directory=directory, cache=cache, part="train"):
        length = len(document.text.encode())
        rank = -int.from_bytes(document.digest[16:], "big")
        heapq.heappush(kept, (rank, length, document.text))
        taken += length
        while taken - kept[0][1] >= size:
            taken -= heapq.heappop(kept)[1]
    for _, _, text in sorted(kept, reverse=True):
        yield text


def is_heldout(digest: bytes, heldout: float) -> bool:
    """The side of a document or file with this sha256. A larger share holds out all that a smaller one does."""
    return int.from_bytes(digest[:8], "big") < heldout * 2.0**64


def _embedded(
    source: dict[str, Any],
    heldout: float,
    directory: Path,
    cache: Path | None,
    tally: Tally,
    on_bytes: Callable[[int], None],
    and_heldout: bool,
) -> Iterator[Document]:
    files = [(file, data, is_heldout(digest, heldout)) for file, digest, data in _files(source, cache)]
    for side in (False, True) if and_heldout else (False,):
        for file, data, out in files:
            if file.package == "topics" or out == side:
                for document in _documents_of(source["view"], file, data, out, tally):
                    if file.package == "topics":  # one file of many independent texts: split by text
                        out = is_heldout(document.digest, heldout)
                        document = Document(**{**vars(document), "heldout": out})
                        if out != side:
                            continue
                    yield document
                on_bytes(len(data) if file.package != "topics" or not side else 0)


def _files(source: dict[str, Any], cache: Path | None) -> list[tuple[embedded.EmbeddedFile, bytes, bytes]]:
    """(file, its sha256, its bytes) of an embedded source, sorted by name within each package."""
    digests = DigestCache(cache / "files.json" if cache is not None else None)
    now = embedded.semantic(source["view"], source["packages"], digests, "source")
    if now["files"] != source["files"]:
        raise StoreError(
            f"The files of {', '.join(source['packages'])} are no longer those that were planned with "
            "(a package was installed or upgraded). Plan again."
        )
    found = []
    for package in source["packages"]:
        for file in embedded.files(package):
            data = Path(file.path).read_bytes()
            found.append((file, hashlib.sha256(data).digest(), data))
    return found


def _documents_of(
    view: str, file: embedded.EmbeddedFile, data: bytes, heldout: bool, tally: Tally
) -> Iterator[Document]:
    try:
        if file.package == "topics":
            yield from _topics(file, decode(data))
            return
        taken = take_apart(decode(data))
    except (SyntaxError, ValueError) as error:  # ValueError: undecodable bytes, or null bytes in the source
        tally.errors.append({"file": file.name, "error": f"{type(error).__name__}: {error}"})
        return
    if view == "base":
        if taken.code.strip():
            yield Document(file.name, taken.code, heldout, _digest(taken.code))
    else:
        yield from _docstrings(file, taken, heldout)


def _docstrings(file: embedded.EmbeddedFile, taken: Taken, heldout: bool) -> Iterator[Document]:
    module = _module(file)
    for found in taken.docstrings:
        name = f"{module}.{found.name}" if found.name else module
        signature = found.signature or f"import {module}"
        yield Document(
            file=file.name,
            text=f"{signature}\n{found.text}\n",
            heldout=heldout,
            digest=_digest(found.text),
            symbol=found.symbol,
            name=name,
            signature=signature,
        )


def _topics(file: embedded.EmbeddedFile, source: str) -> Iterator[Document]:
    """pydoc's topics: the module assigns one dict of title -> text."""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Dict):
            for title, text in sorted(ast.literal_eval(statement.value).items()):
                signature = f"help({title!r})"
                body = text.strip("\n")
                yield Document(
                    file=file.name,
                    text=f"{signature}\n{body}\n",
                    heldout=False,
                    digest=_digest(body),
                    symbol="topic",
                    name=title,
                    signature=signature,
                )


def _module(file: embedded.EmbeddedFile) -> str:
    """The dotted name that a file is imported by: stdlib/json/decoder.py -> json.decoder."""
    parts = file.name.removesuffix(".py").split("/")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts[1:] if file.package == "stdlib" else parts)


def _local(
    source: dict[str, Any],
    heldout: float,
    directory: Path,
    cache: Path | None,
    tally: Tally,
    on_bytes: Callable[[int], None],
    and_heldout: bool,
) -> Iterator[Document]:
    digests = DigestCache(cache / "files.json" if cache is not None else None)
    for row in source["files"]:
        path = directory / row["name"]
        try:
            same = digests.sha256(path) == (row["bytes"], row["sha256"])
        except FileNotFoundError:
            same = False
        if not same:
            raise StoreError(f"{path} is no longer the file that was planned with. Plan again.")
        for text in local.read(source, path):
            digest = _digest(text)
            out = is_heldout(digest, heldout)
            if and_heldout or not out:
                yield Document(row["name"], text, out, digest)
        on_bytes(row["bytes"])
    digests.save()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _ignore(size: int) -> None:
    """No one is told."""
