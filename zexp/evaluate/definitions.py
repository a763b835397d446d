"""Task YAMLs as data: read without lm_eval, in the form that goes into an eval's id.

A YAML is an lm-eval task config. What zexp adds stands in `metadata.zexp`:

    documents   how the `tasks` stage makes the task's documents (builder, source, and the builder's own keys);
                absent = the task has data of its own (dataset_path: json with local data_files, or lm-eval's own loading)
    report_as   {lm-eval's metric: name in results}: what to report and how to call it; absent = everything as it is
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from zexp.config.errors import ConfigError
from zexp.store.ids import round12

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):
    """`!function utils.name` stays text: nothing of a user's is imported at plan time."""


def _function(loader: Any, node: yaml.Node) -> str:
    return f"!function {loader.construct_scalar(node)}"


_Loader.add_constructor("!function", _function)


@dataclass(frozen=True)
class Definition:
    """One task YAML.

    config: the YAML with its includes merged, JSON types only. files: the YAML, its includes and the Python files that
    its !function tags name, in the order they were met.
    """

    name: str
    path: Path
    config: dict[str, Any]
    files: tuple[Path, ...]

    @property
    def zexp(self) -> dict[str, Any]:
        """What metadata.zexp says."""
        metadata = self.config.get("metadata")
        found = metadata.get("zexp") if isinstance(metadata, dict) else None
        return found if isinstance(found, dict) else {}

    @property
    def documents(self) -> dict[str, Any] | None:
        """How the documents are made, or None if the task has data of its own."""
        return self.zexp.get("documents")

    @property
    def metrics(self) -> list[str] | None:
        """The names under which results are reported; None if only running the task tells."""
        renamed = self.zexp.get("report_as")
        if renamed:
            return list(renamed.values())
        listed = self.config.get("metric_list")
        if not listed or "process_results" in self.config or "group" in self.config:
            return None
        return [str(entry["metric"]) for entry in listed]


def definitions(folder: Path) -> Iterator[Definition]:
    """Every task or group of the YAMLs below a folder, sorted by path.

    Raises ConfigError for a YAML that cannot be read. Files without `task` or `group` are there to be included.
    """
    for path in sorted(folder.glob("**/*.yaml")):
        config, files = _read(path, ())
        name = config.get("group") or config.get("task")
        if isinstance(name, str):
            yield Definition(name, path, _plain(config, path), tuple(dict.fromkeys(files)))


def _read(path: Path, including: tuple[Path, ...]) -> tuple[dict[str, Any], list[Path]]:
    """The YAML with its includes (local keys win, as in lm-eval) and every file that it was made from."""
    if path in including:
        raise ConfigError(f"{path}: includes itself, by way of {' → '.join(p.name for p in (*including, path))}.")
    try:
        config = yaml.load(path.read_bytes(), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: no YAML that can be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"{path}: an lm-eval task is a YAML mapping with the key `task`; found {type(config).__name__}."
        )
    merged: dict[str, Any] = {}
    files = [path]
    includes = config.pop("include", [])
    for name in includes if isinstance(includes, list) else [includes]:
        included, more = _read((path.parent / name).resolve(), (*including, path))
        merged.update(included)
        files += more
    merged.update(config)
    files += _function_files(config, path)
    return merged, files


def _function_files(value: Any, path: Path) -> list[Path]:
    """The Python files beside the YAML that !function tags name; a module that is importable is not the user's."""
    if isinstance(value, str) and value.startswith("!function "):
        module = value.removeprefix("!function ").rpartition(".")[0]
        file = path.parent / f"{module.replace('.', '/')}.py"
        return [file] if file.is_file() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [file for item in value for file in _function_files(item, path)] if isinstance(value, list) else []


def _plain(value: Any, path: Path) -> Any:
    """JSON types only, so that it can be part of an id."""
    if isinstance(value, dict):
        return {str(key): _plain(item, path) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, path) for item in value]
    if isinstance(value, float):
        return round12(value)
    if value is None or isinstance(value, str | bool | int):
        return value
    raise ConfigError(
        f"{path}: {value!r} is a {type(value).__name__}; quote it, a task is text, numbers, lists and maps."
    )
