"""Successive halving over trainings that are extended: all to a short length, the better part of them further, and so on.

What a rung has trained the next one goes on from, so a study of n variants costs little more than its longest ones
(Jamieson & Talwalkar 2016, arXiv:1502.07943). Pure: rungs from lengths, survivors from scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from zexp.config.errors import ConfigError, Problems
from zexp.config.tokens import parse_length, parse_tokens

DIRECTIONS = ("minimize", "maximize")
HORIZON = ("cosine", "linear")  # schedules whose every step depends on the length: nothing of them can be extended


def rungs(first: object, factor: object, full: object, count: int, axis: str) -> list[int]:
    """The lengths in tokens, ascending, the last of them `full`; as many as it takes to leave one of `count` variants.

    first: tokens, or a share of the full length. Raises ConfigError with everything that is wrong.
    """
    problems = Problems()
    whole = begin = 0
    try:
        whole = parse_tokens(full, axis)
        begin = parse_length(first, whole, "hydra.sweeper.first")
    except ConfigError as error:
        problems.extend(error.problems)
    if not isinstance(factor, int) or isinstance(factor, bool) or factor < 2:
        problems.add(f"hydra.sweeper.factor = {factor!r}: give a whole number from 2 on.")
    elif whole and not 0 < begin < whole:
        problems.add(f"hydra.sweeper.first = {first!r} is {begin:,} tokens, but {axis} is {whole:,}. Begin with less than that.")
    if count < 2:
        problems.add("hydra/sweeper=halving chooses among variants, and there is one. Give the study a grid, arms or seeds.")
    problems.raise_if_any()
    assert isinstance(factor, int)
    found, left = [begin], count
    while found[-1] * factor < whole and (left := math.ceil(left / factor)) > 1:
        found.append(found[-1] * factor)
    return [*found, whole]


def survivors(scores: Sequence[float | None], factor: int, direction: str) -> list[int]:
    """The places of the best one in `factor` (rounded up), in their order. A variant without a score never survives; of
    equal ones the first do."""
    sign = 1.0 if direction == "minimize" else -1.0
    ranked = sorted((sign * score, place) for place, score in enumerate(scores) if score is not None and math.isfinite(score))
    return sorted(place for _, place in ranked[: math.ceil(len(scores) / factor)])


def phase_of(axis: str) -> str:
    """NAME of phases.NAME.tokens. Raises ConfigError for another axis."""
    parts = axis.split(".")
    if len(parts) != 3 or parts[0] != "phases" or parts[2] != "tokens":
        raise ConfigError(f"hydra.sweeper.axis = {axis!r}: it is a phase's length, e.g. phases.pretrain.tokens.")
    return parts[1]
