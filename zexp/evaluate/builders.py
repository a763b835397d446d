"""How the `tasks` stage makes a task's documents: which builders there are, and what each reads. Pure, for plan time."""

from __future__ import annotations

from typing import Any

from zexp.config.errors import ConfigError

CORPUS, SIGNATURES, TOKENIZER = "corpus", "signatures", "tokenizer"  # what a builder reads

# builder -> (numerics, what it reads, its keys with their defaults)
BUILDERS: dict[str, tuple[int, frozenset[str], dict[str, int]]] = {
    # bytes: held-out text in all, in the corpus' shuffled order; longest: of one document, cut at a line end.
    "bits_per_byte": (1, frozenset({CORPUS, TOKENIZER}), {"bytes": 120_000, "longest": 2_000}),
}


def check(asked: dict[str, Any], where: str) -> tuple[dict[str, Any], frozenset[str]]:
    """The builder's keys with defaults filled in, and what it reads. `source` is the caller's.

    Raises ConfigError naming an unknown builder, unknown keys and values that are no positive numbers.
    """
    name = asked.get("builder")
    if name not in BUILDERS:
        raise ConfigError(f"{where}.builder = {name!r}; there is: {', '.join(BUILDERS)}.")
    _, reads, defaults = BUILDERS[name]
    given = {key: value for key, value in asked.items() if key not in ("builder", "source")}
    problems = [f"{where}.{key}: {name} has no such key; it has {', '.join(defaults)}." for key in given.keys() - defaults.keys()]
    options = {**defaults, **given}
    for key in defaults:
        if not isinstance(options[key], int) or isinstance(options[key], bool) or options[key] < 1:
            problems.append(f"{where}.{key} = {options[key]!r}: give a whole number, 1 or more.")
    if problems:
        raise ConfigError(sorted(problems))
    return {"builder": name, **options}, reads


def numerics(builder: str) -> dict[str, int]:
    """The `numerics` entry of a builder."""
    return {f"tasks.{builder}": BUILDERS[builder][0]}
