"""What a user calls things: studies, stages and states of a store by their names, ids or folders. No torch.

RUN is a variant's name, STUDY/VARIANT, the beginning of a stage's id (perhaps with @tokens), or a folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zexp.config.errors import ConfigError
from zexp.store import files
from zexp.store.folder import StageFolder, Store

SHOWN = 8  # candidates in a message


@dataclass(frozen=True)
class State:
    """A published state of a trajectory."""

    folder: StageFolder
    tokens: int

    def __str__(self) -> str:
        return f"{self.folder.path.name}@{self.tokens}"


def studies(store: Store) -> list[str]:
    """The names of the studies in a store, sorted."""
    folder = store.root / "studies"
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if (path / "variants.json").is_file())


def study(store: Store, name: str) -> str:
    """The study of that name, or the one that begins so. Raises ConfigError listing those that there are."""
    known = studies(store)
    if name in known:
        return name
    near = [study for study in known if study.startswith(name)]
    if len(near) == 1:
        return near[0]
    raise ConfigError(
        f"{name!r} is no study of the store {store.root}. "
        + (f"There are: {', '.join(near or known)}." if known else "It has none yet: zexp run +sweeps=quickstart")
    )


def stage(store: Store, said: str) -> StageFolder:
    """The stage that a user names. Raises ConfigError with the candidates if there is not exactly one."""
    return _folder(store, stage_id(store, said) or said)


def state(store: Store, said: str) -> State:
    """The state that a user names: a variant's end, what stands behind the @ of an id, else the newest of a trajectory.

    Raises ConfigError if there is not exactly one trajectory of that name, or no such state in it.
    """
    id = stage_id(store, said)
    tokens = None if id is None else int(id.partition("@")[2])
    if id is None:
        id, tokens = said, _tokens_said(said)
    folder = _folder(store, id)
    if folder.kind != "trajectory":
        raise ConfigError(
            f"{said!r} names {folder}, which is no model. Name a variant, a segment's stage or its folder."
        )
    there = folder.states()
    if tokens is None and there:
        tokens = there[-1]
    if tokens is None or tokens not in there:
        known = (
            f"It has states at {', '.join(f'{one:,}' for one in there)} tokens." if there else "It has no state yet."
        )
        wanted = "" if tokens is None else f" at {tokens:,} tokens"
        raise ConfigError(f"{said!r}: {folder} has no state{wanted}. {known} `zexp run` trains what is missing.")
    return State(folder, tokens)


def _tokens_said(said: str) -> int | None:
    """The tokens of ID@TOKENS, or of a folder .../states/TOKENS."""
    if (path := _path(said)) is not None:
        return int(path.name) if path.parent.name == "states" else None
    _, at, tokens = said.partition("@")
    if at and not tokens.isdigit():
        raise ConfigError(f"{said!r} names no variant, and {tokens!r} behind the @ is no number of tokens.")
    return int(tokens) if at else None


def stage_id(store: Store, said: str) -> str | None:
    """The last segment's stage of the variant with that name, `<hash16>@<tokens>`; None if no variant has it."""
    known = studies(store)
    name, slash, variant = said.partition("/")
    if slash and name in known:
        known_rows = rows(store, name)
        found = [row for row in known_rows if variant in (row["name"], row["row"])]
        if len(found) != 1:
            which = "It could be" if found else "There are"
            names = ", ".join(row["name"] for row in found or known_rows)
            raise ConfigError(f"{variant!r} names {len(found)} variants of {name}. {which}: {names}.")
        return str(found[0]["segments"][-1])
    named = [(one, row) for one in known for row in rows(store, one) if said in (row["name"], row["row"])]
    ids = {row["segments"][-1] for _, row in named}
    if len(ids) > 1:
        candidates = ", ".join(f"{one}/{row['name']}" for one, row in named[:SHOWN])
        raise ConfigError(f"{said!r} names {len(ids)} variants: {candidates}. Name one with its study.")
    return str(ids.pop()) if ids else None


def rows(store: Store, name: str) -> list[dict[str, Any]]:
    """A study's variants, and the states that their anneals fork from."""
    record = files.read_json(store.study(name) / "variants.json")
    return [*record["variants"], *record["pretrained"]]


def _path(said: str) -> Path | None:
    """A stage's folder, or a state's in it; None if it is neither (another folder may be called like a variant)."""
    path = Path(said).resolve()
    is_state = path.parent.name == "states" and path.name.isdigit()
    return path if (path.parent.parent if is_state else path).joinpath("config.yaml").is_file() else None


def _folder(store: Store, said: str) -> StageFolder:
    if (path := _path(said)) is not None:
        said = path.parent.parent.name if path.parent.name == "states" else path.name
    found = store.find(said.partition("@")[0])
    if len(found) != 1:
        if not found:
            raise ConfigError(
                f"{said!r} names no stage of {store.root}. `zexp status STUDY` lists the stages with their ids."
            )
        candidates = ", ".join(str(folder) for folder in found[:SHOWN])
        raise ConfigError(f"{said!r} names {len(found)} stages: {candidates}. Give more digits.")
    return found[0]
