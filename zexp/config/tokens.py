"""Token counts as people write them: 10M, 96K, 1e6, 10%."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from zexp.config.errors import ConfigError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_NUMBER = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE]\+?[0-9]+)?)\s*([KMBT]?)\s*$")


def parse_tokens(value: object, key: str) -> int:
    """A token count as an int: 96K = 96,000, 1.5B, 1e6, 4096 (K, M, B, T are powers of 1,000).

    Raises ConfigError naming `key` for anything that is not a whole, non-negative number of tokens.
    """
    return parse_count(value, key, "token count")


def parse_count(value: object, key: str, what: str) -> int:
    """A count in the same notation. what: a noun for the errors."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ConfigError(f"{key} = {value!r} is no {what}. Write it as 4096, 96K, 1.5B or 1e6.")
    text = repr(value) if isinstance(value, float) else str(value)
    match = _NUMBER.match(text)
    if match is None:
        raise ConfigError(f"{key} = {value!r} is no {what}. Write it as 4096, 96K, 1.5B or 1e6.")
    try:
        count = Decimal(match[1].replace("_", "")) * UNITS[match[2]]
    except InvalidOperation as error:  # the pattern admits nothing Decimal refuses but absurd exponents
        raise ConfigError(f"{key} = {value!r} is no {what}: {error}.") from error
    if count != int(count):
        raise ConfigError(f"{key} = {value!r} is {count}, which is not a whole number.")
    return int(count)


def parse_length(value: object, parent_tokens: int | None, key: str) -> int:
    """A phase's length in tokens; `10%` is a share of its parent's tokens.

    Raises ConfigError for a share without a parent, and as parse_tokens does.
    """
    if isinstance(value, str) and value.strip().endswith("%"):
        if parent_tokens is None:
            raise ConfigError(
                f"{key} = {value!r} is a share of the parent's tokens, but this phase has no parent. "
                "Give a token count, or set its `parent`."
            )
        try:
            share = Decimal(value.strip()[:-1]) / 100
        except InvalidOperation:
            raise ConfigError(f"{key} = {value!r} is no share. Write it as 10% or 2.5%.") from None
        if not share.is_finite() or share <= 0:
            raise ConfigError(f"{key} = {value!r} must be above 0 %.")
        return int((share * parent_tokens).to_integral_value(rounding="ROUND_CEILING"))
    return parse_tokens(value, key)


def round_up(tokens: int, step: int) -> int:
    """The next multiple of `step` (an optimizer step's tokens): fork points are step boundaries."""
    return -(-tokens // step) * step


def say_tokens(tokens: float) -> str:
    """4096 -> '4.1 K', 2_300_000 -> '2.30 M'; for people, never parsed."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.3g} {unit}"
    return f"{tokens:.0f}"
