"""The learning rate as a pure function of tokens.

A schedule is a list of pieces in absolute tokens, `{from, to, shape, start, end}`, each covering [from, to) with a
learning rate that goes from `start` to `end`. With x = (t - from) / (to - from):

    constant         start                                            (start = end; may be open: to = null)
    linear           start + (end - start) x
    cosine           end + (start - end) (1 + cos πx) / 2
    one_minus_sqrt   end + (start - end) (1 - √x)                     arXiv:2405.18392, eq. (1)
    exponential      end + (start - end) (e^(-x/γ) - e^(-1/γ)) / (1 - e^(-1/γ)),   γ = 0.25
                     = A e^(-x/γ) + B with A, B such that the piece starts at `start` and ends at `end`: the anneal
                     of Zamba (arXiv:2405.16712, §4). Unlike start·(end/start)^x it can end at 0.

A shape other than `constant` needs its horizon: where it is cut off changes the values before.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Piece = Mapping[str, Any]

SHAPES = ("constant", "linear", "cosine", "exponential", "one_minus_sqrt")
NUMERICS = {f"schedule.{shape}": 1 for shape in SHAPES}

EXPONENTIAL_GAMMA = 0.25  # of the piece's length; Zamba-7B's anneal


def needs_horizon(shape: str) -> bool:
    """True if values of the shape depend on where it ends, so that it cannot be extended."""
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; one of: {', '.join(SHAPES)}")
    return shape != "constant"


def numerics(pieces: Sequence[Piece]) -> dict[str, int]:
    """The `numerics` entries of the shapes that are used."""
    return {key: NUMERICS[key] for key in sorted({f"schedule.{piece['shape']}" for piece in pieces})}


def lr(pieces: Sequence[Piece], tokens: float) -> float:
    """Learning rate at a token count; the end of the last piece belongs to it.

    The loop asks at the midpoint of a step's tokens, so that a warm-up from 0 begins above 0 and a decay to 0 ends
    above it. Raises ValueError outside the pieces.
    """
    for piece in pieces:
        if piece["from"] <= tokens and (piece["to"] is None or tokens < piece["to"]):
            return _value(piece, tokens)
    if pieces and tokens == pieces[-1]["to"]:
        return _value(pieces[-1], tokens)
    raise ValueError(f"no piece of the schedule covers {tokens} tokens: {[(p['from'], p['to']) for p in pieces]}")


def _value(piece: Piece, tokens: float) -> float:
    start, end, shape = float(piece["start"]), float(piece["end"]), piece["shape"]
    if shape == "constant":
        return start
    x = (tokens - piece["from"]) / (piece["to"] - piece["from"])
    if shape == "linear":
        return start + (end - start) * x
    if shape == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * x)) / 2
    if shape == "one_minus_sqrt":
        return end + (start - end) * (1 - math.sqrt(x))
    if shape == "exponential":
        last = math.exp(-1 / EXPONENTIAL_GAMMA)
        return end + (start - end) * (math.exp(-x / EXPONENTIAL_GAMMA) - last) / (1 - last)
    raise ValueError(f"unknown shape {shape!r}; one of: {', '.join(SHAPES)}")


def check(pieces: Sequence[Piece]) -> list[str]:
    """Every way in which the pieces are not a schedule, in words; empty if they are one."""
    problems = []
    if not pieces:
        problems.append("a schedule has no pieces.")
    for i, piece in enumerate(pieces):
        name = f"piece {i} ({piece['shape']}, from {piece['from']} to {piece['to']})"
        is_last = i == len(pieces) - 1
        if piece["shape"] not in SHAPES:
            problems.append(f"{name}: unknown shape; one of: {', '.join(SHAPES)}.")
            continue
        if piece["to"] is None:
            if needs_horizon(piece["shape"]):
                problems.append(f"{name} is open, but only a constant can be: give it an end.")
            if not is_last:
                problems.append(f"{name} is open, but another piece follows.")
        elif piece["to"] <= piece["from"]:
            problems.append(f"{name} is empty.")
        if not is_last and piece["to"] is not None and pieces[i + 1]["from"] != piece["to"]:
            problems.append(f"{name} ends where the next piece, from {pieces[i + 1]['from']}, does not begin.")
        for key in ("start", "end"):
            if not (math.isfinite(piece[key]) and piece[key] >= 0):
                problems.append(f"{name}: {key} = {piece[key]}; a learning rate is finite and not negative.")
        if piece["shape"] == "constant" and piece["start"] != piece["end"]:
            problems.append(f"{name} goes from {piece['start']} to {piece['end']}: use linear.")
    return problems
