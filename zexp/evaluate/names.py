"""Which task a name means: a YAML in ./evals, one that zexp ships, or one of lm-eval's own.

lm-eval has thousands; its own index takes 7 to 14 s. Here only their names are read, as text and only when a name is in no
evals/: 13,000 files, once per version of lm-eval, kept in the store's cache.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

from zexp.store import files
from zexp.store.errors import StoreError

_KEY = re.compile(r"^(task|group|tag):[ \t]*(.*)$", re.M)
_LISTED = re.compile(r"^[ \t]*-[ \t]+(\S.*)$", re.M)
_COMMENT = re.compile(r"\s+#.*$")


def lm_eval_version() -> str:
    return importlib.metadata.version("lm_eval")


def lm_eval_names(cache: Path) -> dict[str, str]:
    """Name -> YAML (relative to lm-eval's task folder) of its tasks, groups ("group:…") and tags ("tag:").

    cache: a folder for the index; it is written there if it can be.
    """
    kept = cache / f"lm_eval_tasks-{lm_eval_version()}.json"
    try:
        known: dict[str, str] = files.read_json(kept)
        return known
    except (OSError, StoreError):
        pass  # not there, or damaged: it is a cache
    found = scan(lm_eval_folder())
    try:
        cache.mkdir(parents=True, exist_ok=True)
        files.write_json(kept, found)
    except OSError:
        return found  # a plan over somebody else's store, read-only: the next one scans again
    return found


def lm_eval_folder() -> Path:
    """Where lm-eval's task YAMLs lie, found without importing it."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.origin is not None, "lm-eval is a dependency of zexp"
    return Path(spec.origin).parent / "tasks"


def scan(folder: Path) -> dict[str, str]:
    """The names that the YAMLs below a folder define at their top level."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("**/*yaml")):  # `_default_yaml` and the like hold tags
        text = path.read_text(encoding="utf-8", errors="replace")
        keys: dict[str, list[str]] = {}
        for match in _KEY.finditer(text):
            keys[match[1]] = _values(match[2], text[match.end() :])
        where = path.relative_to(folder).as_posix()
        if path.suffix == ".yaml":
            if "group" in keys:
                found.update(dict.fromkeys(keys["group"], f"group:{where}"))
            elif "task" in keys:
                found.update(dict.fromkeys(keys["task"], where))
        for tag in keys.get("tag", []):
            found.setdefault(tag, "tag:")
    return found


def _values(inline: str, rest: str) -> list[str]:
    """The value of a top-level key: one name, [a, b], or the list below it."""
    inline = _COMMENT.sub("", inline).strip()
    if inline.startswith("["):
        return [name for part in inline.strip("[]").split(",") if (name := _unquoted(part))]
    if inline:
        return [_unquoted(inline)]
    names = []
    for line in rest.lstrip("\n").split("\n"):
        match = _LISTED.match(line)
        if match is None:
            break
        names.append(_unquoted(_COMMENT.sub("", match[1])))
    return names


def _unquoted(text: str) -> str:
    return text.strip().strip("'\"")


def near(name: str, known: Iterable[str]) -> list[str]:
    """Up to five names that `name` may have been meant to be."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.7)
    return close or [other for other in known if name.lower() in other.lower()][:5]
