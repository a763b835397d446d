"""Which task a name means: a YAML in ./evals, one that zexp ships, or one of lm-eval's own.

lm-eval has thousands; its own index takes 7 to 14 s. Here only their names are read, as text (13,500 files, 1.6 s), when a
name is in no evals/, and kept in the store's cache for this version of lm-eval.
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

_KEY = re.compile(r"""^["']?(task|group|tag|class|include)["']?:[ \t]*(.*)$""", re.M)
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
    """The names that the YAMLs below a folder define at their top level; a tag may stand in a file that they include."""
    found: dict[str, str] = {}
    tags: list[str] = []
    included: dict[Path, list[str]] = {}  # file -> its tags
    for path in sorted(folder.glob("**/*.yaml")):
        keys = _top_level(path)
        where = path.relative_to(folder).as_posix()
        if "group" in keys and "class" not in keys:
            found.update(dict.fromkeys(keys["group"], f"group:{where}"))
        elif "task" in keys:
            found.update(dict.fromkeys(keys["task"], where))
        tags += keys.get("tag", [])
        for name in keys.get("include", []):
            file = path.parent / name
            if file not in included:
                included[file] = _top_level(file).get("tag", []) if file.is_file() else []
            tags += included[file]
    for tag in tags:
        found.setdefault(tag, "tag:")
    return found


def _top_level(path: Path) -> dict[str, list[str]]:
    """The values of the keys that matter here."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return {match[1]: _values(match[2], text[match.end() :]) for match in _KEY.finditer(text)}


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
